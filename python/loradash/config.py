"""Settings of a LoRA-Dash fine-tuning run."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from loradash_kernels.directions import METHODS

OVERRIDABLE = ("r", "alpha", "directions")


@dataclass(frozen=True)
class DashConfig:
    """Settings of LoRA-Dash (Si et al., ICLR 2025).

    Args:
        r: rank of the LoRA term.
        alpha: the LoRA term is scaled by alpha / r, or alpha / sqrt(r) with `use_rslora`.
        directions: task-specific directions a layer (s in the paper); 0 gives plain LoRA.
        prelaunch_steps: optimizer steps of plain LoRA before the directions are chosen (t in the paper).
        dropout: probability in [0, 1) on the input of the low-rank terms.
        target_modules: names or dotted suffixes of linear layers, or one regular expression that must match a whole name;
            None takes every linear layer.
        exclude_modules: the same, for layers to leave out.
        trainable_modules: modules that train as a whole beside the adapters (a classification head), same forms.
        overrides: pattern -> {"r": .., "alpha": .., "directions": ..} for single layers; the first match counts.
        svd: how directions are found: "auto", "exact" or "randomized" (`loradash_kernels.task_specific_directions`).
        train_bias: train the biases of adapted layers.
        bypassed: what to do where a parent's own code multiplies by a layer's weight without calling the layer: "refuse",
            or "warn" where that code never runs.

    Raises:
        ValueError: a value out of range, named.
    """

    r: int = 8
    alpha: float = 16
    directions: int = 8
    prelaunch_steps: int = 100
    dropout: float = 0.0
    target_modules: str | Sequence[str] | None = None
    exclude_modules: str | Sequence[str] | None = None
    trainable_modules: str | Sequence[str] | None = None
    overrides: dict[str, dict[str, Any]] = field(default_factory=dict)
    use_rslora: bool = False
    svd: str = "auto"
    train_bias: bool = False
    bypassed: str = "refuse"

    def __post_init__(self) -> None:
        if self.r < 1:
            raise ValueError(f"r must be at least 1, got {self.r}")
        if self.directions < 0 or self.prelaunch_steps < 0:
            raise ValueError(
                f"directions and prelaunch_steps must not be negative, got {self.directions}, {self.prelaunch_steps}"
            )
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout}")
        if self.svd not in METHODS:
            raise ValueError(f"svd must be one of {METHODS}, got {self.svd!r}")
        if self.bypassed not in ("refuse", "warn"):
            raise ValueError(f'bypassed must be "refuse" or "warn", got {self.bypassed!r}')
        for pattern, values in self.overrides.items():
            unknown = set(values) - set(OVERRIDABLE)
            if unknown:
                raise ValueError(f"overrides[{pattern!r}] has {sorted(unknown)}; only {OVERRIDABLE} can be overridden")

    @property
    def scaling(self) -> float:
        return self.alpha / (self.r**0.5 if self.use_rslora else self.r)

    def for_module(self, name: str) -> DashConfig:
        """The settings of one layer: the first override whose pattern matches its name, over the common ones."""
        if self.bypassed not in ("refuse", "warn"):
            raise ValueError(f'bypassed must be "refuse" or "warn", got {self.bypassed!r}')
        for pattern, values in self.overrides.items():
            if matches(name, [pattern]) or re.fullmatch(pattern, name):
                return dataclasses.replace(self, overrides={}, **values)
        return self

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> DashConfig:
        """The inverse of `to_dict`. Raises ValueError for names that are no settings."""
        unknown = set(values) - {f.name for f in dataclasses.fields(cls)}
        if unknown:
            raise ValueError(f"unknown settings {sorted(unknown)}")
        return cls(**values)


def matches(name: str, patterns: str | Sequence[str] | None) -> bool:
    """Does a dotted name match: a regular expression (string, whole name), or any of a list of names or suffixes?"""
    if patterns is None:
        return False
    if isinstance(patterns, str):
        return re.fullmatch(patterns, name) is not None
    return any(name == p or name.endswith("." + p) for p in patterns)
