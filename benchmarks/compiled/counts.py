"""A training of a whole model, compiled or eager, launch included: what the compiler did in each phase, and the losses."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from loradash import DashConfig, DashLinear, DashSchedule, apply_dash
from torch import nn
from torch._dynamo import utils
from torch._inductor import config

from .models import Whole, loss_of

LAUNCH, SHAPE = 3, (2, 8)
# The first new shape makes sizes symbolic, the others need nothing new: whatever stays fixed compiles once more.
PHASES = {
    "before launch": [SHAPE] * LAUNCH,
    "after launch": [SHAPE] * 2,
    "other shapes": [(3, 12), (4, 9), (5, 7), (3, 16), SHAPE],
}


@dataclass(frozen=True)
class Phase:
    """Counts of a phase alone. recompilations: of frames that had been compiled before."""

    graphs: int
    breaks: int
    recompilations: int
    losses: tuple[float, ...]


def compiler_counts() -> tuple[int, int, int]:
    """Graphs, graph breaks and recompilations until now."""
    forward = {metric.compile_id for metric in utils.get_compilation_metrics() if metric.co_name}
    again = sum(not str(name).endswith("/0") for name in forward)
    return utils.counters["stats"]["unique_graphs"], sum(utils.counters["graph_break"].values()), again


@contextlib.contextmanager
def fresh_compiler() -> Iterator[None]:
    """Nothing is compiled, nothing counted. What Inductor draws at random is what eager calls draw."""
    torch._dynamo.reset()
    utils.counters.clear()
    utils.clear_compilation_metrics()
    with config.patch(fallback_random=True):
        yield
    torch._dynamo.reset()


def adapted(whole: Whole, dropout: float = 0.0) -> nn.Module:
    """Every linear layer, r 4, s 4."""
    settings = DashConfig(
        r=4, alpha=8, directions=4, dropout=dropout, target_modules=list(whole.targets), prelaunch_steps=LAUNCH
    )
    return apply_dash(whole.model(), settings)


def schedule_of(model: nn.Module) -> DashSchedule | None:
    """None for a plain model."""
    is_adapted = any(isinstance(module, DashLinear) for module in model.modules())
    return DashSchedule(model, progress=False) if is_adapted else None


def trained(model: nn.Module, call: Any, phases: Sequence[str] = tuple(PHASES)) -> dict[str, Phase]:
    """Trains the model through `call`, which is itself or compiled from it; plain models train whole."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    schedule = schedule_of(model)
    found, numbers = {}, itertools.count()
    for name in phases:
        before, losses = compiler_counts(), []
        for rows, tokens in PHASES[name]:
            torch.manual_seed(next(numbers))
            loss = loss_of(call, rows, tokens)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if schedule is not None:
                schedule.step()
            losses.append(loss.item())
        counts = (after - first for after, first in zip(compiler_counts(), before, strict=True))
        found[name] = Phase(*counts, tuple(losses))
    return found


def compiled(model: nn.Module, backend: str, phases: Sequence[str] = tuple(PHASES)) -> dict[str, Phase]:
    """`trained` through torch.compile, in one graph or not at all: torch raises where a graph breaks."""
    with fresh_compiler():
        return trained(model, torch.compile(model, backend=backend, fullgraph=True), phases)


def gap(ours: Phase, theirs: Phase) -> float:
    """The largest difference of losses, relative."""
    return max(abs(a - b) / abs(b) for a, b in zip(ours.losses, theirs.losses, strict=True))
