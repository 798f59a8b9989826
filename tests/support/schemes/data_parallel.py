"""DistributedDataParallel."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from loradash import DashConfig
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..collectives import Traffic
from . import Run, Scheme, adapting_experts, with_experts

OPTIONS: dict[str, dict[str, Any]] = {
    "ddp": {},
    "ddp_static": {"static_graph": True},
    "ddp_view": {"gradient_as_bucket_view": True},
    "ddp_unused": {"find_unused_parameters": True},
}


class DDP(Scheme):
    """With the options of the scheme's name."""

    def wrap(self, model: nn.Module) -> nn.Module:
        return DistributedDataParallel(model, **OPTIONS.get(self.name, {}))

    def frozen(self) -> None:
        """DDP takes no model in which nothing trains, and there is nothing to send."""
        return None

    def check_traffic(self, model: nn.Module, base: Traffic, ours: Traffic) -> None:
        trained = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
        assert ours.bytes == {"all_reduce": trained}, (ours.bytes, trained)


class Experts(DDP):
    @property
    def config(self) -> DashConfig:
        return adapting_experts(super().config)

    def network(self) -> nn.Module:
        return with_experts()


class Four(DDP):
    """Four processes, without dropout."""

    processes = parts = 4
    dropout = 0.0


class Accumulating(DDP):
    """Two micro-batches a step, the first without a reduction; one process computes each part at once, so nothing is dropped."""

    dropout = 0.0

    def step(self, run: Run, x: Tensor, target: Tensor) -> Tensor:
        halves = zip(x.chunk(2), target.chunk(2), strict=True)
        losses = []
        for number, (inputs, wanted) in enumerate(halves):
            with contextlib.nullcontext() if number else run.model.no_sync():
                loss = self.loss(run.model(inputs), wanted) / 2
                loss.backward()
            losses.append(loss.detach())
        run.optimizer.step()
        run.optimizer.zero_grad()
        run.schedule.step()
        return sum(losses, torch.zeros(()))


SCHEMES = {**dict.fromkeys(OPTIONS, DDP), "ddp_experts": Experts, "ddp_no_sync": Accumulating, "ddp_four": Four}
