"""Settings of a LoRA-Dash fine-tuning run."""

from __future__ import annotations

import dataclasses
import math
import numbers
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from loradash_kernels.directions.policy import METHODS

from . import presets

OVERRIDABLE = ("r", "alpha", "directions")


@dataclass(frozen=True)
class DashConfig:
    """Settings of LoRA-Dash (Si et al., ICLR 2025).

    Every value is checked and brought to one form, that of `to_dict`: numbers of Python, lists of names (sorted where they
    came as a set). What is accepted here can be written as JSON and read again.

    Args:
        r: rank of the LoRA term, at least 1.
        alpha: the LoRA term is scaled by alpha / r, or alpha / sqrt(r) with `use_rslora`; positive.
        directions: task-specific directions a layer (s in the paper); 0 gives plain LoRA.
        prelaunch_steps: optimizer steps of plain LoRA before the directions are chosen (t in the paper).
        dropout: probability in [0, 1) on the input of the low-rank terms.
        target_modules: names or dotted suffixes of layers, or one regular expression that must match a whole name; None takes
            every linear layer. A convolution that is a linear layer over channels can be named; others are refused.
        exclude_modules: the same, for layers to leave out.
        trainable_modules: modules that train as a whole beside the adapters (a classification head), same forms.
        overrides: pattern -> {"r": .., "alpha": .., "directions": ..} for single layers; the first match counts.
        svd: how directions are found: "auto", "exact" or "randomized" (`loradash_kernels.task_specific_directions`).
        train_bias: train the biases of adapted layers.
        bypassed: what to do where a parent's own code multiplies by a layer's weight without calling the layer: "refuse",
            or "warn" where that code never runs.
        target_parameters: names or dotted suffixes of experts' stacked parameters ("mlp.experts.gate_up_proj"), or a regular
            expression as above: one adapter an expert. None takes none; `target_modules=[]` adapts them alone.

    Raises:
        ValueError: a value of the wrong kind or out of range, named.
    """

    r: int = 8
    alpha: float = 16
    directions: int = 8
    prelaunch_steps: int = 100
    dropout: float = 0.0
    target_modules: str | Iterable[str] | None = None
    exclude_modules: str | Iterable[str] | None = None
    trainable_modules: str | Iterable[str] | None = None
    overrides: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    use_rslora: bool = False
    svd: str = "auto"
    train_bias: bool = False
    bypassed: str = "refuse"
    target_parameters: str | Iterable[str] | None = None

    def __post_init__(self) -> None:
        for name, check in _CHECKS.items():
            object.__setattr__(self, name, check(name, getattr(self, name)))

    @property
    def scaling(self) -> float:
        return self.alpha / (self.r**0.5 if self.use_rslora else self.r)

    def for_module(self, name: str) -> DashConfig:
        """The settings of one layer: the first override whose pattern matches its name, over the common ones."""
        for pattern, values in self.overrides.items():
            if _overrides(pattern, name):
                return dataclasses.replace(self, overrides={}, **values)
        return self

    def to_dict(self) -> dict[str, Any]:
        """All settings by name, ready for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> DashConfig:
        """The inverse of `to_dict`, before or after a way through JSON.

        Raises ValueError for names that are no settings and for values that these refuse.
        """
        if not isinstance(values, Mapping):
            raise ValueError(f"settings must be a dict by name, got {values!r}")
        unknown = sorted(map(str, set(values) - set(_CHECKS)))
        if unknown:
            raise ValueError(f"unknown settings {unknown}")
        return cls(**values)

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> DashConfig:
        """The paper's settings for one of its experiments, with some of them replaced: `preset("commonsense-llama-7b", r=16)`.

        `loradash.presets.PRESETS[name]` tells each number's source, and under `training` the learning rate and what else
        belongs to the run. Another r keeps the ratio of alpha to r. Raises ValueError for an unknown name, and where
        `DashConfig` refuses a value.
        """
        return cls.from_dict(presets.settings(name, **overrides))


def matches(name: str, patterns: str | Iterable[str] | None) -> bool:
    """Does a dotted name match: a regular expression (string, whole name), or any of a list of names or suffixes?"""
    if patterns is None:
        return False
    if isinstance(patterns, str):
        return re.fullmatch(patterns, name) is not None
    return any(name == p or name.endswith("." + p) for p in patterns)


def without_match(patterns: str | Iterable[str] | None, names: Sequence[str]) -> list[str]:
    """Which of the patterns match none of the names."""
    each = [patterns] if isinstance(patterns, str) else [[p] for p in patterns or ()]
    return [p if isinstance(p, str) else p[0] for p in each if not any(matches(name, p) for name in names)]


def _overrides(pattern: str, name: str) -> bool:
    return matches(name, [pattern]) or matches(name, pattern)


def unmatched(config: DashConfig, linear_names: Sequence[str], module_names: Sequence[str]) -> list[str]:
    """What in exclude_modules, trainable_modules and overrides matches nothing in a model: one message a pattern.

    Args:
        linear_names: names of the layers that can be adapted; exclude_modules and overrides speak of these.
        module_names: names of all modules, for trainable_modules.

    A list in target_modules may name layers of several architectures, so it is not looked at.
    """
    problems: list[str] = []
    kinds = "linear layer" if config.target_parameters is None else "linear layer or experts' parameter"
    for setting, names, kind in (
        ("exclude_modules", linear_names, kinds),
        ("trainable_modules", module_names, "module"),
    ):
        problems += [f"{setting}: {p!r} matches no {kind}" for p in without_match(getattr(config, setting), names)]
    for pattern in config.overrides:
        if not any(_overrides(pattern, name) for name in linear_names):
            problems.append(f"overrides: {pattern!r} matches no {kinds}")
    return problems


def _refuse(name: str, value: Any, wanted: str) -> ValueError:
    return ValueError(f"{name} must be {wanted}, got {value!r}")


def _integer(least: int) -> Callable[[str, Any], int]:
    def check(name: str, value: Any) -> int:
        # To Python bool is an Integral; a user who gives one mistook the order of arguments.
        if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < least:
            raise _refuse(name, value, f"an integer of at least {least}")
        return int(value)

    return check


def _real(accepts: Callable[[float], bool], wanted: str) -> Callable[[str, Any], float]:
    def check(name: str, value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            raise _refuse(name, value, wanted)
        try:
            number = float(value)
        except OverflowError:
            raise _refuse(name, value, wanted) from None
        if not (math.isfinite(number) and accepts(number)):
            raise _refuse(name, value, wanted)
        return int(value) if isinstance(value, numbers.Integral) else number

    return check


def _boolean(name: str, value: Any) -> bool:
    if not isinstance(value, bool | np.bool_):
        raise _refuse(name, value, "True or False")
    return bool(value)


def _one_of(choices: tuple[str, ...]) -> Callable[[str, Any], str]:
    def check(name: str, value: Any) -> str:
        if not isinstance(value, str) or value not in choices:
            raise _refuse(name, value, f"one of {choices}")
        return str(value)

    return check


def _expression(name: str, value: str) -> str:
    try:
        re.compile(value)
    except (re.error, RecursionError, OverflowError) as error:
        raise _refuse(name, value, f"a regular expression ({error})") from error
    return str(value)


def _patterns(name: str, value: Any) -> str | list[str] | None:
    wanted = "a regular expression, names of modules, or None"
    if value is None:
        return None
    if isinstance(value, str):
        if not value:
            raise _refuse(name, value, wanted)
        return _expression(name, value)
    if not isinstance(value, Iterable) or isinstance(value, Mapping | bytes):
        raise _refuse(name, value, wanted)
    try:
        members = list(value)
    # An array without dimensions calls itself iterable.
    except TypeError as error:
        raise _refuse(name, value, wanted) from error
    if not all(isinstance(m, str) and m for m in members):
        raise _refuse(name, value, f"{wanted}; names are strings and not empty")
    names = [str(m) for m in members]
    return sorted(names) if isinstance(value, set | frozenset) else names


def _override_table(name: str, value: Any) -> dict[str, dict[str, Any]]:
    if not isinstance(value, Mapping):
        raise _refuse(name, value, "a dict of pattern -> settings")
    table: dict[str, dict[str, Any]] = {}
    for pattern, settings in value.items():
        if not isinstance(pattern, str) or not pattern:
            raise _refuse(f"a pattern of {name}", pattern, "a regular expression or a name")
        where = f"{name}[{pattern!r}]"
        if not isinstance(settings, Mapping):
            raise _refuse(where, settings, f"a dict of {', '.join(OVERRIDABLE)}")
        unknown = sorted(map(str, set(settings) - set(OVERRIDABLE)))
        if unknown:
            raise ValueError(f"{where} has {unknown}; only {OVERRIDABLE} can be overridden")
        checked = {key: _CHECKS[key](f"{where}[{key!r}]", setting) for key, setting in settings.items()}
        table[_expression(f"a pattern of {name}", pattern)] = checked
    return table


_CHECKS: dict[str, Callable[[str, Any], Any]] = {
    "r": _integer(1),
    # At 0 nothing would ever train.
    "alpha": _real(lambda alpha: alpha > 0, "a positive number"),
    "directions": _integer(0),
    "prelaunch_steps": _integer(0),
    "dropout": _real(lambda p: 0 <= p < 1, "a number in [0, 1)"),
    "target_modules": _patterns,
    "exclude_modules": _patterns,
    "trainable_modules": _patterns,
    "overrides": _override_table,
    "use_rslora": _boolean,
    "svd": _one_of(METHODS),
    "train_bias": _boolean,
    "bypassed": _one_of(("refuse", "warn")),
    "target_parameters": _patterns,
}
"""One check for each field of `DashConfig`: (name of the setting, its value) to the value in its one form."""
