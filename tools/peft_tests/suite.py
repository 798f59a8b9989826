"""Which of PEFT's files run, and what of them."""

from __future__ import annotations

from typing import NamedTuple


class Suite(NamedTuple):
    file: str
    """Without its folder and ending."""
    keyword: str = ""
    """What pytest's -k selects; all where it is empty."""
    fuses: bool = True
    """Whether calls of plain LoRA layers are among its tests, so that the accelerator must have taken some."""


SUITES = (
    Suite("test_custom_models", "lora"),
    Suite("test_initialization"),
    Suite("test_tuners_utils"),
    Suite("test_lora_variants", fuses=False),
    Suite("test_mixed"),
    Suite("test_low_level_api"),
    Suite("test_other"),
    Suite("test_target_parameters"),
    Suite("test_trainable_tokens"),
    Suite("test_lora_conversion"),
    Suite("test_loraplus"),
    Suite("test_lorafa"),
    Suite("test_config"),
    Suite("test_auto"),
    Suite("test_decoder_models", "lora"),
    Suite("test_encoder_decoder_models", "lora"),
    Suite("test_feature_extraction_models", "lora"),
    Suite("test_seq_classifier", "lora"),
    Suite("test_torch_compile", "lora"),
)
