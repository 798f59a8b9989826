"""Settings of the paper's experiments (arXiv 2409.01035), as plain facts with their sources.

The sources are files of the authors' repository, github.com/Chongjie-Si/Subspace-Tuning, which belongs to the paper. What
they do not tell for LoRA-Dash stands under `missing` and is given no value here: the run's author decides. The tables in the paper's
appendix are not among the sources.
"""

from __future__ import annotations

import numbers
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Preset:
    """One experiment.

    Attributes:
        model: the pretrained model, as the source names it.
        config: fields of `DashConfig`.
        training: settings of the run that `DashConfig` has no field for.
        sources: where each setting stands, by name; "*" for all the others.
        missing: settings that no source gives.
    """

    model: str
    config: Mapping[str, Any]
    training: Mapping[str, Any] = field(default_factory=dict)
    sources: Mapping[str, str] = field(default_factory=dict)
    missing: tuple[str, ...] = ()

    def source(self, setting: str) -> str:
        """Where a setting of `config` or `training` stands. Raises KeyError for one that the preset lacks."""
        if setting not in self.config and setting not in self.training:
            raise KeyError(setting)
        return self.sources.get(setting, self.sources["*"])

    def __str__(self) -> str:
        lines = [f"{k}: {v!r}  ({self.source(k)})" for k, v in {**self.config, **self.training}.items()]
        return "\n".join([f"model: {self.model}", *lines, *(f"{setting}: in no source" for setting in self.missing)])


_PHASES = "CR_MR/peft/src/peft/tuners/lora-dash.py and SdG/peft/tuners/lora/layer.py: index 8, warmup 100"
_FINETUNE = "CR_MR/finetune.py"


def _commonsense(model: str, script: str, learning_rate: float, ranks: str = "", about_rate: str = "") -> Preset:
    return Preset(
        model,
        config={
            "r": 32,
            "alpha": 64,
            "dropout": 0.05,
            "directions": 8,
            "prelaunch_steps": 100,
            "target_modules": ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"],
        },
        training={
            "learning_rate": learning_rate,
            "batch_size": 16,
            "epochs": 3,
            "cutoff_length": 256,
            "optimizer": "AdamW",
            "weight_decay": 0.0,
            "scheduler": "linear",
            "warmup_steps": 100,
            "precision": "fp16",
            "dataset": "commonsense_170k",
        },
        sources={
            "*": script,
            "r": f"CR_MR/README.md: {script.rpartition('/')[2]} is called with 32 64{ranks}",
            "alpha": f"CR_MR/README.md: {script.rpartition('/')[2]} is called with 32 64",
            "dropout": _FINETUNE,
            "directions": _PHASES,
            "prelaunch_steps": _PHASES,
            "learning_rate": f"{script}{about_rate}",
            "optimizer": _FINETUNE,
            "weight_decay": _FINETUNE,
            "scheduler": f"{_FINETUNE}, which leaves it to transformers' Trainer",
            "warmup_steps": _FINETUNE,
            "precision": _FINETUNE,
        },
    )


PRESETS: Mapping[str, Preset] = {
    "commonsense-llama-7b": _commonsense(
        "yahma/llama-7b-hf", "CR/scripts/llama.sh", 2e-4, "; Fair_Comparison/README.md has results of 4 and 32"
    ),
    "commonsense-llama2-7b": _commonsense(
        "meta-llama/Llama-2-7b-hf", "CR_MR/scripts_for_CR/llama2.sh", 2e-4, about_rate=", a run of DoRA"
    ),
    "commonsense-llama3-8b": _commonsense(
        "meta-llama/Meta-Llama-3-8B",
        "CR_MR/scripts_for_CR/llama3.sh",
        1e-4,
        "; Fair_Comparison/README.md has results of 16 and 32",
    ),
    "glue-deberta-v3-base": Preset(
        "microsoft/deberta-v3-base",
        config={
            "r": 2,
            "alpha": 4,
            "directions": 8,
            "prelaunch_steps": 100,
            "target_modules": [
                "query_proj",
                "key_proj",
                "value_proj",
                "attention.output.dense",
                "intermediate.dense",
                "output.dense",
            ],
            "trainable_modules": ["pooler", "classifier"],
        },
        training={"optimizer": "AdamW"},
        sources={
            "*": "NLU/README.md: query, key, value, intermediate, layer.output, attention.output",
            "r": "NLU/README.md, its LoRA run on RoBERTa-large; the paper has 2 and 8",
            "alpha": "NLU/README.md, its LoRA run on RoBERTa-large",
            "directions": _PHASES,
            "prelaunch_steps": _PHASES,
            "trainable_modules": "NLU/examples/text-classification/run_glue.py: all outside of the encoder trains",
            "optimizer": "NLU/examples/text-classification/run_glue.py, which leaves it to transformers' Trainer",
        },
        missing=("learning_rate", "batch_size", "epochs", "dropout"),
    ),
    "dreambooth-sdxl": Preset(
        "stabilityai/stable-diffusion-xl-base-1.0",
        config={
            "r": 4,
            "alpha": 4,
            "directions": 8,
            "prelaunch_steps": 100,
            "dropout": 0.0,
            "target_modules": ["to_q", "to_k", "to_v", "to_out.0"],
        },
        training={
            "learning_rate": 1e-4,
            "batch_size": 4,
            "steps": 500,
            "resolution": 1024,
            "initialisation": "A normal, of standard deviation 1 / r",
            "optimizer": "AdamW",
            "weight_decay": 1e-4,
            "scheduler": "constant",
            "warmup_steps": 0,
            "precision": "fp16",
            "dataset": "DreamBooth",
        },
        sources={
            "*": "SdG/train.sh",
            "r": "SdG/train.py, its default rank",
            "alpha": "SdG/train.py: the rank",
            "directions": _PHASES,
            "prelaunch_steps": _PHASES,
            "dropout": "SdG/train.py, which gives none",
            "target_modules": "SdG/train.py, the U-Net's",
            "initialisation": "SdG/train.py: gaussian",
            "optimizer": "SdG/train.py",
            "weight_decay": "SdG/train.py",
            "batch_size": "SdG/train.sh: 1 image, 4 accumulated",
            "dataset": "SdG/README.md",
        },
    ),
}


def known(name: str) -> Preset:
    """A preset by its name. Raises ValueError for an unknown one."""
    # What cannot be hashed is no name either.
    if name not in list(PRESETS):
        raise ValueError(f"no preset {name!r}; there are {', '.join(PRESETS)}")
    return PRESETS[name]


def settings(name: str, **overrides: Any) -> dict[str, Any]:
    """The fields of `DashConfig` of a preset, with some of them replaced.

    Where `r` is replaced and `alpha` is not, alpha keeps its ratio to r: 2 in all runs of the authors' language models, 1 in
    those on SDXL. Raises ValueError for an unknown name.
    """
    preset = known(name)
    found = {**preset.config, **overrides}
    # Whatever else is given for r, `DashConfig` refuses.
    if "alpha" not in overrides and isinstance(found["r"], numbers.Integral):
        found["alpha"] = preset.config["alpha"] // preset.config["r"] * int(found["r"])
    return found
