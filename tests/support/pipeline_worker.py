"""One of two processes of a pipeline: support.processes.run_processes("from support.pipeline_worker import main; main()", ...)

Each has a stage of the network, adapted by itself, with a schedule and files of its own.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import loradash
import torch
import torch.distributed as dist
from loradash import DashConfig, DashSchedule, apply_dash
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, ScheduleGPipe
from torch.nn import functional as F

from .schemes import LAUNCH, STEPS, Network, Run, batch, network

MICRO_BATCHES = 4
CONFIG = DashConfig(r=3, directions=3, prelaunch_steps=LAUNCH)


class Stage(nn.Module):
    """A block of the network under its name there, and the head behind the last."""

    def __init__(self, model: Network, number: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleDict({str(number): model.blocks[number]})
        self.head = model.head if number else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks.values():
            x = block(x)
        return self.head(x)


def adapted() -> Network:
    """The whole network, of one seed."""
    model = network()
    torch.manual_seed(1)
    return apply_dash(model, CONFIG)


def begin(model: nn.Module, **options: Any) -> Run:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    return Run(model, optimizer, DashSchedule(model, progress=False, **options))


def steps_of_one(run: Run, first: int, last: int) -> list[float]:
    """Losses of one process that has the whole network."""
    losses = []
    for step in range(first, last):
        x, target = batch(step)
        loss = F.mse_loss(run.model(x), target)
        loss.backward()
        run.optimizer.step()
        run.optimizer.zero_grad()
        run.schedule.step()
        losses.append(loss.item())
    return losses


def stage_of(number: int) -> Stage:
    """A stage whose adapters are those of the whole network."""
    stage = apply_dash(Stage(network(), number), CONFIG)
    stage.load_state_dict({k: v for k, v in adapted().state_dict().items() if k in stage.state_dict()})
    return stage


def steps(run: Run, rank: int, first: int, last: int) -> list[float]:
    """Losses in the last stage's process; the other has none."""
    stage = PipelineStage(run.model, rank, 2, torch.device("cpu"))
    schedule = ScheduleGPipe(stage, MICRO_BATCHES, loss_fn=F.mse_loss)
    losses: list[float] = []
    for step in range(first, last):
        x, target = batch(step)
        parts: list[Tensor] = []
        if rank:
            schedule.step(target=target, losses=parts)
            losses.append(torch.stack(parts).mean().item())
        else:
            schedule.step(x)
        run.optimizer.step()
        run.optimizer.zero_grad()
        run.schedule.step()
    return losses


def main() -> None:
    rank, store, folder = int(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    said: dict[str, Any] = {}
    run = begin(stage_of(rank), group="self")
    losses = steps(run, rank, 0, 2)
    loradash.save_training(folder / "two.2", *run)
    losses += steps(run, rank, 2, 6)
    said["launched"] = run.schedule.launched
    loradash.save_training(folder / "two.6", *run)
    said["losses"] = losses + steps(run, rank, 6, STEPS)
    said["file"] = str(loradash.save_adapter(run.model, folder / f"stage.{rank}.safetensors"))
    for start in (2, 6):
        again = begin(stage_of(rank), group="self")
        loradash.load_training(folder / f"one.{start}", *again)
        said[f"from {start}"] = steps(again, rank, start, STEPS)
    # Where nobody says that the processes' layers differ, the launch is refused.
    alike = begin(stage_of(rank))
    try:
        steps(alike, rank, 0, STEPS)
    except ValueError as error:
        said["refused"] = str(error)
    said["unchanged"] = not alike.schedule.launched
    print(json.dumps(said))
    sys.stdout.flush()
    dist.barrier()
    os._exit(0)
