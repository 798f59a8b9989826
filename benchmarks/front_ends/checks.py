"""What the arms must agree on before any of them gets a time: the losses of a few steps of the Trainer, without dropout.

Fresh adapters add nothing, so that every arm starts at the frozen model's loss. Trained ones are given the same values in every
arm: all arms without directions must then give the losses of one another, step by step, and so must all with them. Both must
be further from each other, and from the frozen model, than what is allowed between those that are to agree.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from torch import nn

from .arms import ACCELERATED, FROZEN, Arm, build, callbacks_of
from .models import Sizes
from .training import TrainerRun

# In bf16 each step of Adam, which divides by what small gradients are, drives the arms apart by their roundings.
STEPS = {"fp32": 4, "bf16": 2}
# The check's batch is small: which formula a layer computes does not depend on it.
TOKENS = 32
# How far losses may be apart. In bf16 the arms round at different places, once a product or oftener.
ALLOWED = {"fp32": 1e-3, "bf16": 0.12}
# How many times that must two formulas be apart?
TELLING = 3.0


class RedCheck(AssertionError):
    """An arm is wrong, so none gets a time."""


def losses(arm: Arm, sizes: Sizes, folder: Path, fresh: bool = False, steps: int | None = None) -> list[float]:
    """The losses of the first optimizer steps."""
    model, steps = build(arm, sizes, dropout=0.0, fresh=fresh), steps or STEPS[sizes.dtype]
    with TrainerRun(model, sizes, folder, callbacks_of(arm)) as run:
        for _ in range(steps):
            run.step()
        check_fused(arm, model, steps)
        return run.losses


def check_fused(arm: Arm, model: nn.Module, steps: int) -> None:
    """Raises RedCheck unless every call of the accelerated arm ran fused in so many steps, which are all that the model has
    taken: an accelerator that gave way would be PEFT under another name."""
    if arm.name != ACCELERATED:
        return
    from loradash.integrations.peft import accelerate

    report = accelerate(model)
    if report.fused != steps * len(report.layers) or report.calls.total() != report.fused:
        raise RedCheck(f"{arm.name}: {steps} steps of {len(report.layers)} layers ran so:\n{report}")


def check_arms(arms: Sequence[Arm], sizes: Sizes, folder: Path) -> dict[str, float]:
    """The largest distance of any loss from what it had to be, by arm. Raises RedCheck where it is too large."""
    small, allowed = replace(sizes, batch=1, tokens=min(TOKENS, sizes.tokens)), ALLOWED[sizes.dtype]
    frozen = next(losses(arm, small, folder) for arm in arms if arm.name == FROZEN)
    first: dict[bool, list[float]] = {}
    distances = {}
    for arm in arms:
        if arm.name == FROZEN:
            continue
        start = losses(arm, small, folder, fresh=True, steps=1)[0]
        _compare(f"{arm.name}, fresh", [start], frozen[:1], allowed)
        found = losses(arm, small, folder)
        wanted = first.setdefault(arm.launched, found)
        distances[arm.name] = _compare(arm.name, found, wanted, allowed)
    check_power([frozen, *first.values()], allowed)
    return distances


def _distance(one: list[float], other: list[float]) -> float:
    return max(abs(a - b) for a, b in zip(one, other, strict=True))


def _compare(name: str, found: list[float], wanted: list[float], allowed: float) -> float:
    distance = _distance(found, wanted)
    # The comparison with NaN is false.
    if not distance <= allowed:
        raise RedCheck(f"{name}: losses {found}, wanted {wanted} within {allowed}")
    return distance


def check_power(groups: list[list[float]], allowed: float) -> None:
    """Raises RedCheck where the losses of two formulas hardly differ."""
    for one, other in itertools.combinations(groups, 2):
        if not _distance(one, other) > TELLING * allowed:
            raise RedCheck(f"the check tells nothing: losses {one} and {other} of two formulas")
