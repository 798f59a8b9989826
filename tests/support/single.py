"""A training program of one process, of the network and the batches of `support.schemes`, without dropout."""

from __future__ import annotations

import loradash
import torch
from loradash import DashConfig, DashSchedule
from torch.nn import functional as F

from .schemes import LAUNCH, batch, network

CONFIG = DashConfig(r=3, directions=3, prelaunch_steps=LAUNCH, trainable_modules=["head"])


def begin(optimizer=torch.optim.AdamW, **options):
    model = loradash.apply_dash(network(), CONFIG)
    made = optimizer([p for p in model.parameters() if p.requires_grad], lr=1e-2, **options)
    return model, made, DashSchedule(model, progress=False)


def steps(run, first, last):
    model, optimizer, schedule = run
    losses = []
    for step in range(first, last):
        x, target = batch(step)
        loss = F.mse_loss(model(x), target)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(loss.item())
    return losses
