"""LoRA-Dash inside PEFT, and an accelerator for its plain LoRA layers.

import loradash.integrations.peft
model = get_peft_model(model, DashLoraConfig(r=8, directions=8))
schedule = loradash.DashSchedule(model)

The import makes LORADASH one of PEFT's methods: adapters of it load by `PeftModel.from_pretrained(base, folder)`, and without
the import they do not load at all.
"""

try:
    import peft as _peft  # noqa: F401
except ModuleNotFoundError as error:
    raise ImportError("loradash.integrations.peft needs PEFT: pip install 'loradash-kernels[peft]'") from error

from . import versions as _versions  # noqa: F401
from .accelerator import accelerate, accelerated, decelerate
from .config import DashLoraConfig
from .files import from_lora
from .model import DashLoraModel
from .registration import register as _register

_register(DashLoraConfig, DashLoraModel)

__all__ = ["DashLoraConfig", "DashLoraModel", "accelerate", "accelerated", "decelerate", "from_lora"]
