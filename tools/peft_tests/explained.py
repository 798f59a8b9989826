"""Differences that have a reason: which tests end otherwise under a switch, and why that is right.

A reason that no test of a whole run needs is an error of that run, as a difference without one is.
"""

from __future__ import annotations

import re
from typing import NamedTuple

# LORADASH stands in for LoRA before launch, and with everything launched.
TUNER = ("loradash", "launched")


class Reason(NamedTuple):
    switches: tuple[str, ...]
    message: str
    """A regular expression that is found in what the test said: the same test failing otherwise is a difference again."""
    why: str
    test: str = ""
    """One that is found in the test's name."""

    def explains(self, switch: str, test: str, message: str) -> bool:
        return switch in self.switches and bool(re.search(self.message, message) and re.search(self.test, test))


REASONS = (
    Reason(
        TUNER,
        "is a setting of LoRA that LoRA-Dash does not have",
        "`DashLoraConfig` refuses settings that are other methods: DoRA, aLoRA, KaSA, Arrow, target_parameters and the like",
    ),
    Reason(
        TUNER,
        "init_lora_weights=.* makes another layer of the base layer",
        "`DashLoraConfig` refuses initialisations that change the base weight, whose directions are looked for",
    ),
    Reason(
        TUNER,
        "cannot be adapted: LoRA-Dash is a method for linear layers",
        "LORADASH refuses embeddings, convolutions and attention modules: the method has directions of linear layers alone",
    ),
    Reason(
        TUNER,
        "modules registered for LoRA .* have no dash term",
        "layers that somebody registered for LoRA would be plain LoRA in our place, and LORADASH refuses them",
        "TestDynamicDispatch::",
    ),
    Reason(
        TUNER,
        "peft_type` 'LORADASH' is not compatible with the `PeftMixedModel`",
        "`PeftMixedModel` makes layers of PEFT's own methods alone; it would put plain LoRA in our place",
    ),
    Reason(
        TUNER,
        r"Parameter containing:\\ntensor\(\[0\.",
        "an adapter that starts as the identity is before launch, when its Δσ has no gradient and stays where it is",
        "test_only_params_are_updated",
    ),
    Reason(
        TUNER,
        r"(?s)to require gradients, got .*lora_dash_sigma",
        "Δσ trains beside A and B, and these tests list what trains",
        "TestRequiresGrad::",
    ),
    Reason(
        TUNER,
        "DID NOT WARN",
        "LORADASH refuses a convolution before PEFT warns of its bias",
        r"base_layer_has_no_bias_warns_and_raises\[conv2d",
    ),
    Reason(
        TUNER,
        r"'DashLoraModel' == 'LoraModel'|'default': 'LORADASH'|adapter_model_type='DashLoraModel'|lora_dash_launched",
        "the type has a name of its own, and more tensors, and these tests write down those of LoRA",
        "TestModelAndLayerStatus::|TestTunerStateDictKeyPrefixes::",
    ),
    Reason(
        TUNER,
        "unsupported operand type.*'NoneType' and 'Tensor'",
        "PEFT's LoRA-FA optimizer takes its parameters in pairs of A and B, and Δσ is a third; it is for plain LoRA",
        r"test_lorafa\.py::",
    ),
    Reason(
        TUNER,
        "Hotswapping only supports LORA but LORADASH was passed|LORADASH and IA3|Expected regex: .*merged.*Hotswapping",
        "PEFT swaps adapters of plain LoRA alone without loading them anew; `load_adapter` does it",
        "TestHotSwapping::",
    ),
    Reason(
        TUNER,
        "ensure_weight_tying: an adapter of .* would have to be the embedding's too|DID NOT WARN",
        "LORADASH refuses a target that is tied to an embedding, where PEFT would adapt or warn of both",
        "TestWeightTying::",
    ),
    Reason(
        TUNER,
        "DID NOT WARN",
        "LORADASH refuses a convolution before PEFT warns of its bias",
        "test_lora_conv2d_with_bias_when_base_layer_has_no_bias_warns",
    ),
    Reason(
        TUNER,
        "(?s)Regex pattern did not match.*tuners.lora.layer",
        "the layer's class, which PEFT's message names, is ours",
        "test_modules_to_save_targets_lora_layer_raises",
    ),
    Reason(
        ("launched",),
        r"assert tensor\(0\.\d+\) [<>] 0\.",
        "these bounds on what random pruning leaves were set for updates without a dash term",
        r"test_add_weighted_adapter_with_different_scaling\[(dare|magnitude_prune)",
    ),
)
