"""Tiny mixtures of experts with random weights, by the kind of their experts module, and adapters in them."""

from __future__ import annotations

from typing import Any

import torch
from loradash import DashConfig, apply_dash, dash_layers
from torch import nn

SIZES = {
    "vocab_size": 32,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
}
NAMES = ["model.layers.0.mlp.experts.gate_up_proj", "model.layers.0.mlp.experts.down_proj"]
IDS = torch.randint(1, 32, (2, 8), generator=torch.Generator().manual_seed(3))

# Weights (E, N, K); the same of many experts with a shared one; (E, K, N) with biases; all tokens through all experts.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "Mixtral": ("MixtralForCausalLM", {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 24}),
    "Qwen3Moe": (
        "Qwen3MoeForCausalLM",
        {
            "num_experts": 6,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 12,
            "intermediate_size": 24,
            "head_dim": 8,
        },
    ),
    "DeepseekV3": (
        "DeepseekV3ForCausalLM",
        {
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_group": 1,
            "topk_group": 1,
            "first_k_dense_replace": 0,
            "moe_intermediate_size": 12,
            "intermediate_size": 24,
            "kv_lora_rank": 8,
            "q_lora_rank": None,
            "qk_rope_head_dim": 4,
            "qk_nope_head_dim": 4,
            "v_head_dim": 8,
        },
    ),
    "GptOss": (
        "GptOssForCausalLM",
        {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 12, "head_dim": 8, "sliding_window": 8},
    ),
    "Llama4": (
        "Llama4ForCausalLM",
        {
            "num_local_experts": 4,
            "num_experts_per_tok": 1,
            "intermediate_size": 12,
            "intermediate_size_mlp": 12,
            "head_dim": 8,
        },
    ),
}
BOTH = ["experts.gate_up_proj", "experts.down_proj"]


def moe(kind: str = "Mixtral", implementation: str | None = None, **settings: Any) -> nn.Module:
    """A model in eval mode whose parameters have an order of magnitude that shows."""
    import transformers

    name, sizes = MODELS[kind]
    config_class = getattr(transformers, name).config_class
    config = config_class(**{**SIZES, **sizes, **settings})
    if implementation is not None:
        config._experts_implementation = implementation
    torch.manual_seed(0)
    model = getattr(transformers, name)(config)
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=draw) * 0.3)
    return model.eval()


def adapted(model: nn.Module, **settings: Any) -> nn.Module:
    """Both parameters of every experts module with adapters, nothing else."""
    values = {
        "r": 3,
        "directions": 2,
        "prelaunch_steps": 2,
        "target_modules": [],
        "target_parameters": BOTH,
        **settings,
    }
    return apply_dash(model, DashConfig(**values))


def logits(model: nn.Module, ids: torch.Tensor = IDS) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids).logits


def loss_of(model: nn.Module, ids: torch.Tensor = IDS) -> torch.Tensor:
    return model(input_ids=ids, labels=ids).loss


def filled(model: nn.Module, launched: bool = True) -> nn.Module:
    """Every adapter gets values as after some steps, and directions as after a launch."""
    draw = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for layer in dash_layers(model).values():
            layer.launched.fill_(launched)
            parts = (layer.lora_a, layer.lora_b, layer.dash_u, layer.dash_vt, layer.dash_sigma)
            for tensor in parts[: 5 if launched else 2]:
                tensor.copy_(torch.randn(tensor.shape, generator=draw) * 0.3)
    return model


def update_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """ΔW of every adapted parameter in its stored shape, from the adapters' tensors, by autograd's operations."""
    found = {}
    for name, layer in dash_layers(model).items():
        delta = layer.scaling * torch.einsum("enr,erk->enk", layer.lora_b, layer.lora_a)
        delta = delta + torch.einsum("ens,es,esk->enk", layer.dash_u, layer.dash_sigma, layer.dash_vt)
        found[name] = delta if delta.shape == layer.weight.shape else delta.mT
    return found
