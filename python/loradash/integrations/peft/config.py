"""`DashLoraConfig`: PEFT's LoraConfig with the settings of LoRA-Dash."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass, field
from typing import Any

from huggingface_hub import ModelCard
from peft import LoraConfig

from loradash import presets
from loradash.config import DashConfig

from .registration import PEFT_TYPE
from .versions import SAVES_BIASES

FORMAT = 1
"""Of an adapter's files: the settings' names and meanings, and the tensors beside lora_A and lora_B."""

INITIALISATIONS = (True, False, "gaussian", "orthogonal")
"""Values of init_lora_weights that leave the base weight, whose directions are looked for, as it is."""

_CARD, HINT = "README.md", "This adapter is LoRA-Dash: `import loradash.integrations.peft` before PEFT loads it."
"""The model card beside an adapter's files, and what it says: without the import PEFT knows no such method."""

# What PEFT has for LoRA and LoRA-Dash has no meaning for, or no place; variants are found by their metadata.
_ABSENT = (
    "use_dora",
    "use_qalora",
    "use_bdlora",
    "alora_invocation_tokens",
    "arrow_config",
    "loftq_config",
    "eva_config",
    "corda_config",
    "lora_ga_config",
    "layer_replication",
    "target_parameters",
    "megatron_config",
)
_OURS = {
    "r": "r",
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "use_rslora": "use_rslora",
    "directions": "directions",
    "prelaunch_steps": "prelaunch_steps",
    "svd": "svd",
}
"""Names here, and in `DashConfig`, which checks their values."""


@dataclass
class DashLoraConfig(LoraConfig):
    """Settings of a LoRA-Dash adapter in PEFT (Si et al., ICLR 2025): those of LoraConfig that have a meaning here, and

    Args:
        directions: task-specific directions a layer (s in the paper); 0 gives plain LoRA.
        prelaunch_steps: optimizer steps of plain LoRA before the directions are chosen (t in the paper).
        svd: how they are found: "auto", "exact" or "randomized".
        loradash_format: written with the adapter; not for you to set.

    Raises ValueError for values out of range, for settings of LoRA's variants (DoRA and the like), for initialisations that
    change the base weight, and for an adapter that a newer loradash wrote.
    """

    directions: int = field(default=8, metadata={"help": "Task-specific directions of each layer."})
    prelaunch_steps: int = field(default=100, metadata={"help": "Optimizer steps before the directions are chosen."})
    svd: str = field(default="auto", metadata={"help": "How directions are found: auto, exact or randomized."})
    loradash_format: int = field(default=FORMAT, metadata={"help": "Version of the adapter's files."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PEFT_TYPE
        _check_format(self.loradash_format)
        _check_absent(self)
        for theirs, ours in _OURS.items():
            _checked(theirs, ours, getattr(self, theirs))
        for name, ours in (("rank_pattern", "r"), ("alpha_pattern", "alpha")):
            for pattern, value in (getattr(self, name) or {}).items():
                _checked(f"{name}[{pattern!r}]", ours, value)

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """PEFT's. A model card that PEFT wrote into the folder before tells how the adapter is loaded."""
        super().save_pretrained(save_directory, **kwargs)
        path = os.path.join(save_directory, _CARD)
        if os.path.isfile(path):
            card = ModelCard.load(path)
            if HINT not in card.text:
                card.text = f"{HINT}\n\n{card.text}"
                card.save(path)

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> DashLoraConfig:
        """The paper's settings for one of its experiments, with some of them replaced: `preset("commonsense-llama-7b", r=16)`.

        They are those of `DashConfig.preset`, by their names in PEFT; `loradash.presets.PRESETS[name]` has the learning rate and
        what else belongs to the run. Another r keeps the ratio of lora_alpha to r. Raises ValueError for an unknown name.
        """
        theirs = {ours: theirs for theirs, ours in _OURS.items()} | {"trainable_modules": "modules_to_save"}
        ours = {name: ours for ours, name in theirs.items()}
        found = presets.settings(name, **{ours.get(key, key): value for key, value in overrides.items()})
        return cls(**{theirs.get(key, key): value for key, value in found.items()})

    def dash_config(self, r: int | None = None, alpha: float | None = None) -> DashConfig:
        """The same as a `DashConfig`, for a layer with a rank and an alpha of its own where they are given."""
        settings = {ours: getattr(self, theirs) for theirs, ours in _OURS.items()}
        own = {"r": r, "alpha": alpha}
        return DashConfig(**settings | {key: value for key, value in own.items() if value is not None})


def _checked(name: str, ours: str, value: Any) -> None:
    try:
        DashConfig(**{ours: value})
    except ValueError as error:
        raise ValueError(str(error) if name == ours else f"{name}: {error}") from error


def _check_format(found: Any) -> None:
    if type(found) is not int or found < 1:
        raise ValueError(f"loradash_format must be an integer of at least 1, got {found!r}")
    if found > FORMAT:
        raise ValueError(
            f"this adapter was written by a newer loradash (format {found}, this one reads up to {FORMAT}): upgrade "
            "loradash-kernels"
        )


def _check_absent(config: DashLoraConfig) -> None:
    variants = [f.name for f in dataclasses.fields(config) if f.metadata.get("is_lora_variant")]
    for name in dict.fromkeys((*_ABSENT, *variants)):
        if getattr(config, name, None):
            raise ValueError(f"{name} is a setting of LoRA that LoRA-Dash does not have; leave it out")
    if config.bias != "none" and not SAVES_BIASES:
        raise ValueError(f"bias={config.bias!r}: this version of PEFT would not save the biases; it takes peft 0.21")
    initial = config.init_lora_weights
    if initial not in INITIALISATIONS:
        raise ValueError(
            f"init_lora_weights={initial!r} makes another layer of the base layer, or another start of the adapter than LoRA-Dash "
            f"has; wanted one of {INITIALISATIONS}"
        )
