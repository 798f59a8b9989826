"""LoRA-Dash inside PEFT, and an accelerator for its plain LoRA layers."""
from .accelerator import accelerate, accelerated
