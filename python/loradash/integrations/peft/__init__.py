"""LoRA-Dash inside PEFT, and an accelerator for its plain LoRA layers."""
