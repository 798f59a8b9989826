"""Which of PEFT's files run, and what stands beneath them."""

from __future__ import annotations

from typing import NamedTuple

PREFIX = "PEFT_TESTS_"
"""Before the names of the plugin's options in the environment."""

ABOUT = {
    "accelerated": "inside `with accelerated():`",
    "accelerate": "`accelerate(model)` after every adapter that is put into a model",
    "loradash": "`DashLoraConfig` in the place of `LoraConfig`, before launch",
    "launched": "the same, with every adapter that does not start as the identity launched at once, Δσ ≠ 0",
}
"""What each switch of tools/peft_tests/switches.py turns on; "off" is PEFT alone."""


# Where few layers are called, or none, the two that are left out would say the same again.
BRIEFLY = ("accelerated", "loradash")


class Suite(NamedTuple):
    file: str
    """Without its folder and ending."""
    fuses: bool = True
    """Whether its tests call plain LoRA layers, so that some calls must have run fused."""
    hub: bool = False
    """Whether next to nothing of it runs without models from the Hugging Face hub."""
    only: str = ""
    """A regular expression that is found in the names of the tests that run; all run where it is empty."""
    switches: tuple[str, ...] = tuple(ABOUT)
    """Those that it runs under when none is asked for."""


SUITES = (
    Suite("test_custom_models"),
    Suite("test_initialization"),
    Suite("test_mixed"),
    Suite("test_low_level_api"),
    Suite("test_tuners_utils", fuses=False, switches=BRIEFLY),
    Suite("test_lora_variants", fuses=False, switches=BRIEFLY),
    Suite("test_other", switches=BRIEFLY),
    Suite("test_loraplus", switches=BRIEFLY),
    Suite("test_lorafa", switches=BRIEFLY),
    Suite("test_config", fuses=False, switches=BRIEFLY),
    Suite("test_target_parameters", fuses=False, hub=True, switches=BRIEFLY),
    Suite("test_trainable_tokens", hub=True, switches=BRIEFLY),
    Suite("test_lora_conversion", hub=True, switches=BRIEFLY),
    Suite("test_auto", hub=True),
    Suite("test_torch_compile", hub=True),
    Suite("test_decoder_models", hub=True),
    Suite("test_encoder_decoder_models", hub=True),
    Suite("test_feature_extraction_models", hub=True),
    Suite("test_seq_classifier", hub=True),
)

SLICE = Suite(
    "test_custom_models",
    only=r"\[(Vanilla MLP 1 LoRA with lora_b bias|LoRA (Same|Different))-"
    r"|_(merge|forward|save|load|disable)\w*\[Embedding \+ transformers Conv1D 1 LoRA-",
)
"""A part that runs in seconds."""
