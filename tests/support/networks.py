"""A small adapted network and its training."""

from __future__ import annotations

import torch
from loradash import DashConfig, DashSchedule, apply_dash
from torch import nn


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(20, 30), nn.Tanh(), nn.Linear(30, 20), nn.Tanh(), nn.Linear(20, 3))


CONFIG = DashConfig(r=3, directions=2, prelaunch_steps=4, trainable_modules=["4"], overrides={"2": {"r": 5}})
X, LABELS = torch.randn(16, 20, generator=torch.Generator().manual_seed(1)), torch.arange(16) % 3


def train(model, steps):
    schedule = DashSchedule(model, progress=False)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(X), LABELS).backward()
        optimizer.step()
        schedule.step()
    return model


def trained(steps=6):
    return train(apply_dash(network(), CONFIG), steps)
