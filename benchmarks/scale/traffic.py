"""Counts what one process of a scheme hands to collectives in a training step.

    python -m benchmarks.scale.traffic SCHEME RANK STORE FILE

Four trainings of one network (`network.py`) under the scheme: frozen but for the head, LoRA-Dash before launch and after it
(the head trains there too), and all parameters. A step is forward, backward, the optimizer's and the schedule's step; it is
counted when one has gone before. Process 0 writes FILE: for every training, bytes and calls by kind of collective, and what
`modelled.py` expects.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist
from loradash import apply_dash
from support.collectives import Traffic
from support.schemes import Run, Scheme, of_part, scheme
from torch import nn

from .modelled import MODELS, sizes
from .network import RANK, batch, network

FROZEN, BEFORE, LAUNCH, AFTER, FULL = "frozen", "before launch", "the launching step", "after launch", "all trains"


class NoSchedule:
    """In place of a DashSchedule, where nothing launches."""

    def step(self) -> bool:
        return False


def counted(way: Scheme, run: Run) -> dict[str, Any]:
    """One step's bytes and calls by kind. The batch asks for its gradient, as in the middle of a larger network, so that
    a frozen model too is passed through backwards."""
    x, target = (of_part(t, way.part(), way.parts) for t in batch())
    x.requires_grad_()
    with Traffic() as traffic:
        way.step(run, x, target)
    return {"bytes": dict(traffic.bytes), "calls": dict(traffic.calls)}


def modelled(way: Scheme, training: str) -> int | None:
    """What the scheme's own rules ask for in a step; None for the one that launches."""
    if training == LAUNCH:
        return None
    return MODELS[way.name](sizes(training in (BEFORE, AFTER), training == FULL))


def head_alone(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith("head."))


def plain(way: Scheme, prepare: Callable[[nn.Module], None]) -> dict[str, Any]:
    """A training without adapters."""
    model = network()
    prepare(model)
    wrapped = way.wrap(model)
    run = Run(wrapped, way.optimizer(wrapped), NoSchedule())  # type: ignore[arg-type]
    counted(way, run)
    return counted(way, run)


def measure(way: Scheme) -> dict[str, Any]:
    """Every training's count; the adapted model launches at the third step."""
    found = {FROZEN: plain(way, head_alone)}
    config = dataclasses.replace(way.config, r=RANK, directions=RANK, prelaunch_steps=3)
    run = way.begin(apply_dash(network(), config))
    steps = [counted(way, run) for _ in range(5)]
    if not run.schedule.launched:
        raise RuntimeError(f"{way.name} did not launch")
    found |= {BEFORE: steps[1], LAUNCH: steps[2], AFTER: steps[4]}
    found[FULL] = plain(way, lambda model: None)
    return {training: {**count, "modelled": modelled(way, training)} for training, count in found.items()}


def main(name: str, rank: str, store: str, file: str) -> None:
    way = scheme(name, int(rank))
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=int(rank), world_size=way.processes)
    way.set_up()
    found = measure(way)
    if int(rank) == 0:
        Path(file).write_text(json.dumps(found))
    sys.stdout.flush()
    dist.barrier()
    # The interpreter's exit now and then aborts in gloo's threads.
    os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
