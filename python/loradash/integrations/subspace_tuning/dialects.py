"""The names under which the authors' three code bases keep an adapter's tensors, and ours: one table for layers and files."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

Dialect = Literal["loralib", "cr_mr", "sdg", "loradash"]

INDEX = 8
"""The number of directions that the authors' classes have (their attribute `index`)."""

WARMUP = 100
"""The forward calls before launch in their classes (their attribute `warmup`)."""

FLAG = "lora_flag"
"""A key that only our layers write: [forward calls, or a schedule's steps; launched?]. The authors' FLAG is in no state dict."""

PARTS = ("lora_a", "lora_b", "dash_sigma", "dash_u", "dash_vt")

# {adapter} is the name that the fork of PEFT in SdG gives an adapter; its files leave it out, with the dot before it.
KEYS: dict[Dialect, dict[str, str]] = {
    "loradash": {**{part: part for part in PARTS}, "launched": "launched"},
    "loralib": {
        "lora_a": "lora_A",
        "lora_b": "lora_B",
        "dash_sigma": "lora_index",
        "dash_u": "weight_u_top",
        "dash_vt": "weight_vt_top",
        "sigma": "lora_change_a",
        "delta": "lora_change_bb",
        "flag": FLAG,
    },
    "cr_mr": {
        "lora_a": "lora_A.weight",
        "lora_b": "lora_B.weight",
        "dash_sigma": "lora_index.weight",
        "dash_u": "lora_w_u",
        "dash_vt": "lora_w_vt",
        "flag": FLAG,
    },
    "sdg": {
        "lora_a": "lora_A.{adapter}.weight",
        "lora_b": "lora_B.{adapter}.weight",
        "dash_sigma": "lora_index.{adapter}.weight",
        "dash_u": "lora_w_u.{adapter}",
        "dash_vt": "lora_w_vt.{adapter}",
        "flag": f"{FLAG}.{{adapter}}",
    },
}

PEFT_PREFIX = "base_model.model."
"""What the forks of PEFT put before every name."""


@dataclass
class Parsed:
    """A state dict taken apart.

    layers: for each adapted layer its tensors by our names, "sigma" and "delta" (n,) and "flag" where they were there.
    rest: everything else, under its own key without PEFT's prefix.
    """

    dialect: Dialect
    layers: dict[str, dict[str, Tensor]]
    rest: dict[str, Tensor]
    adapter: str | None = None
    keys: dict[tuple[str, str], str] = field(default_factory=dict)
    """(layer, part) -> the key it came under, for error messages."""


def parse(tensors: Mapping[str, Tensor]) -> Parsed:
    """Finds out whose state dict it is and takes it apart. Raises ValueError where it has no adapter, or several kinds."""
    found = {dialect: _matches(dialect, tensors) for dialect in KEYS}
    dialects = [dialect for dialect, matches in found.items() if matches]
    if len(dialects) != 1:
        kinds = ", ".join(dialects) or "none"
        raise ValueError(f"wanted the keys of one kind of adapter ({', '.join(KEYS)}), found {kinds}")
    dialect = dialects[0]
    adapters = sorted({adapter for *_, adapter in found[dialect].values() if adapter})
    if len(adapters) > 1:
        raise ValueError(f"holds several adapters ({', '.join(adapters)}); give the keys of one")
    prefix = PEFT_PREFIX if all(key.startswith(PEFT_PREFIX) for key in found[dialect]) else ""
    parsed = Parsed(dialect, {}, {}, adapters[0] if adapters else None)
    for key, tensor in tensors.items():
        if key in found[dialect]:
            name, part, _ = found[dialect][key]
            name = name.removeprefix(prefix)
            parsed.layers.setdefault(name, {})[part] = tensor
            parsed.keys[name, part] = key
        else:
            parsed.rest[key.removeprefix(prefix)] = tensor
    return parsed


def _matches(dialect: Dialect, keys: Iterable[str]) -> dict[str, tuple[str, str, str | None]]:
    """Those of the keys that are of a dialect: layer, part, name of the adapter."""
    patterns = {}
    for part, suffix in KEYS[dialect].items():
        escaped = re.escape(suffix).replace(r"\{adapter\}", r"(?P<adapter>[^.]+)")
        patterns[part] = re.compile(rf"(?:(?P<name>.*)\.)?{escaped}")
    found: dict[str, tuple[str, str, str | None]] = {}
    for key in keys:
        for part, pattern in patterns.items():
            match = pattern.fullmatch(key)
            if match:
                found[key] = match["name"] or "", part, match.groupdict().get("adapter")
                break
    # A layer without both factors has only a name in common with this dialect.
    whole: dict[str, set[str]] = {}
    for name, part, _ in found.values():
        whole.setdefault(name, set()).add(part)
    return {k: v for k, v in found.items() if {"lora_a", "lora_b"} <= whole[v[0]]}


def key_of(dialect: Dialect, name: str, part: str, adapter: str | None = None) -> str:
    """The key of a part of a layer; of SdG's fork as in a model (adapter), or as in its files (None)."""
    suffix = KEYS[dialect][part]
    suffix = suffix.replace(".{adapter}", "") if adapter is None else suffix.format(adapter=adapter)
    return f"{name}.{suffix}" if name else suffix


def narrowed(name: str, part: str, tensor: Tensor, s: int) -> Tensor:
    """A direction's part of their fixed width with s directions: what is cut off must be zero."""
    if part == "dash_sigma":
        tensor = tensor.reshape(-1)
    dim = 1 if part == "dash_u" else 0
    if part not in ("dash_sigma", "dash_u", "dash_vt") or tensor.shape[dim] <= s:
        return tensor
    if bool(tensor.narrow(dim, s, tensor.shape[dim] - s).any()):
        raise ValueError(f"{name} has {tensor.shape[dim]} directions, more than its weight has: {s}")
    return tensor.narrow(dim, 0, s)


def widened(part: str, tensor: Tensor) -> Tensor:
    """A part with fewer directions in the width of their classes: the added ones are zero and change nothing.

    Raises ValueError for more directions than theirs.
    """
    dim = 1 if part == "dash_u" else 0
    if part not in ("dash_sigma", "dash_u", "dash_vt") or tensor.shape[dim] == INDEX:
        return tensor
    if tensor.shape[dim] > INDEX:
        raise ValueError(f"directions = {tensor.shape[dim]}: the authors' classes have {INDEX}")
    more = list(tensor.shape)
    more[dim] = INDEX - tensor.shape[dim]
    return torch.cat((tensor, tensor.new_zeros(more)), dim)
