"""The versions of PEFT that this front end is tested with, and what differs between them."""

from __future__ import annotations

from typing import Any

import peft
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import save_and_load
from torch import Tensor, nn

OLDEST, BELOW = (0, 19, 1), (0, 22)
"""PEFT from the first on and below the second."""


def check_version(version: str) -> None:
    """Raises ImportError for a version of PEFT outside the range; releases before a version count as that version."""
    found = tuple(int(part) for part in version.split("+")[0].split(".")[:3] if part.isdigit())
    if found < OLDEST or found[:2] >= BELOW:
        oldest, below = (".".join(map(str, bound)) for bound in (OLDEST, BELOW))
        raise ImportError(
            f"loradash.integrations.peft works with peft from {oldest} on and below {below}, and {version} is installed: "
            f"pip install 'peft>={oldest},<{below}'"
        )


check_version(peft.__version__)

SAVES_BIASES = hasattr(BaseTuner, "_get_adapter_state_dict")
"""Does PEFT save the biases that a method other than its own LoRA trained? From 0.21 on, where a method tells what it saves."""


def warn_of_shards(tensors: dict[str, Tensor], adapter: str) -> None:
    """PEFT's warning that A or B is about to be saved in parts; before 0.21 it has none."""
    check: Any = getattr(save_and_load, "_validate_lora_adapter_state_dict", None)
    if check is not None:
        check(tensors, adapter_name=adapter)


def adapter_state_dict(model: nn.Module, adapter: str) -> dict[str, Tensor]:
    """What PEFT saves of an adapter. Before 0.20 it adds what all other adapters have, under their names, which is left out."""
    configs: Any = model.peft_config
    others = set(configs) - {adapter}
    saved = peft.get_peft_model_state_dict(model, adapter_name=adapter)
    return {key: t for key, t in saved.items() if not others & set(key.rpartition(".lora_")[2].split(".")[1:])}
