"""The authors' settings (arguments of their layers, adapter_config.json of their forks of PEFT) as a `DashConfig`, and back."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ...config import DashConfig
from .dialects import INDEX, WARMUP, Dialect
from .run import run_config

# What an adapter computes does not depend on these; r and target_modules are those of its tensors.
_WITHOUT_EFFECT = {
    "r",
    "target_modules",
    "rank_pattern",
    "lora_use_dash",
    "lora_use_dash_pattern",
    "merge_weights",
    "fan_in_fan_out",
    "inference_mode",
    "base_model_name_or_path",
    "task_type",
    "auto_mapping",
    "revision",
    "layers_to_transform",
    "layers_pattern",
    "megatron_core",
}
_TAKEN = {"lora_alpha", "alpha_pattern", "lora_dropout", "use_rslora", "bias", "modules_to_save"}
# What has no counterpart in LoRA-Dash as it is here, with the values that mean it is not used.
_REFUSED: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "enable_lora": (None,),
    "use_dora": (False,),
    "lora_use_map": (False,),
    "lora_use_map_pattern": (None, {}),
    "layer_replication": (None,),
    "megatron_config": (None,),
    "loftq_config": (None, {}),
    "init_lora_weights": (True, False, "gaussian"),
}


def dash_config(
    settings: Mapping[str, Any], layers: Mapping[str, Mapping[str, Tensor]], trainable: list[str]
) -> DashConfig:
    """A `DashConfig` from their settings.

    Args:
        layers: for each adapted layer its tensors by our names; ranks and widths are theirs.
        trainable: names of the modules that train as a whole.

    Raises ValueError, naming the setting, for what has no counterpart here and for what is no setting of theirs.
    """
    for key, value in settings.items():
        if key in _REFUSED and not any(value == unused for unused in _REFUSED[key]):
            raise ValueError(f"{key} = {value!r} has no counterpart in LoRA-Dash")
        if key not in (*_REFUSED, *_TAKEN, *_WITHOUT_EFFECT):
            raise ValueError(f"{key} is no setting of the authors' LoRA-Dash")
    bias = settings.get("bias") or "none"
    if bias not in ("none", "lora_only"):
        raise ValueError(f"bias = {bias!r} has no counterpart: it trains biases outside of adapted layers")
    if settings.get("lora_alpha") is None:
        raise ValueError("lora_alpha is missing; the tensors do not tell the scaling")
    each = {}
    for name, parts in layers.items():
        rank = parts["lora_a"].shape[0]
        wanted = _by_pattern(settings, "rank_pattern", name, settings.get("r"))
        if wanted is not None and wanted != rank:
            raise ValueError(f"r = {wanted} for {name}, whose tensors have rank {rank}")
        each[name] = DashConfig(
            r=rank,
            alpha=_by_pattern(settings, "alpha_pattern", name, settings["lora_alpha"]),
            directions=INDEX if "dash_sigma" in parts else 0,
            prelaunch_steps=WARMUP,
            dropout=settings.get("lora_dropout") or 0.0,
            use_rslora=bool(settings.get("use_rslora")),
            train_bias=bias == "lora_only",
        )
    return run_config(each, trainable)


def _by_pattern(settings: Mapping[str, Any], which: str, name: str, otherwise: Any) -> Any:
    """A layer's value as SdG's fork looks it up: the first pattern of either table that matches, or the name itself."""
    tables = [settings.get(table) or {} for table in ("rank_pattern", "alpha_pattern")]
    patterns = itertools.chain(*tables)
    key = next((pattern for pattern in patterns if re.match(rf".*\.{pattern}$", name)), name)
    return (settings.get(which) or {}).get(key, otherwise)


def authors_settings(
    config: DashConfig, names: list[str], dialect: Dialect, trainable: list[str], launched: bool
) -> dict[str, Any]:
    """Their settings from a `DashConfig`: arguments of loralib's `Linear`, or what adapter_config.json holds.

    Raises ValueError, naming the setting of ours, for what has no counterpart there.
    """
    each = {name: config.for_module(name) for name in names}
    if not launched and config.prelaunch_steps != WARMUP:
        raise ValueError(f"prelaunch_steps = {config.prelaunch_steps}: the authors' classes have {WARMUP}")
    few = {name: s.directions for name, s in each.items() if s.directions not in (0, INDEX)}
    if not launched and few:
        name, directions = next(iter(few.items()))
        raise ValueError(
            f"directions = {directions} for {name} before launch: the authors' classes would choose {INDEX}"
        )
    if config.use_rslora and dialect != "sdg":
        raise ValueError("use_rslora has no counterpart in this code base")
    plain = {name: False for name, s in each.items() if s.directions == 0}
    if plain and dialect != "sdg":
        raise ValueError(f"directions = 0 for {next(iter(plain))}: these classes have {INDEX} in every layer")
    found: dict[str, Any] = {
        "r": config.r,
        "lora_alpha": config.alpha,
        "lora_dropout": config.dropout,
        "rank_pattern": {name: s.r for name, s in each.items() if s.r != config.r},
        "alpha_pattern": {name: s.alpha for name, s in each.items() if s.alpha != config.alpha},
        "bias": "lora_only" if config.train_bias else "none",
        "modules_to_save": trainable or None,
    }
    for name, s in each.items():
        for table, value, common in (("rank_pattern", s.r, config.r), ("alpha_pattern", s.alpha, config.alpha)):
            if _by_pattern(found, table, name, common) != value:
                raise ValueError(f"overrides: {name} would get another layer's value, by the end of its name")
    if dialect == "cr_mr":
        for table in ("rank_pattern", "alpha_pattern"):
            if found.pop(table):
                raise ValueError(f"overrides: this code base has one r and lora_alpha for all layers ({table})")
    if dialect == "sdg":
        found |= {
            "use_rslora": config.use_rslora,
            "lora_use_dash": len(plain) < len(names),
            "lora_use_dash_pattern": plain if len(plain) < len(names) else {},
        }
    if dialect != "loralib":
        found |= {
            "peft_type": "LORA",
            "task_type": None,
            "base_model_name_or_path": None,
            "inference_mode": True,
            "fan_in_fan_out": False,
            "target_modules": names,
        }
    if dialect == "cr_mr":
        found |= {"merge_weights": False, "enable_lora": None}
    return found
