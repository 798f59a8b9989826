"""Fused projections of transformers' models with adapters for their parts, served by PEFT."""

from __future__ import annotations

import copy

import pytest
import torch
from loradash import DashConfig, apply_dash, dash_layers, export_lora, merge_and_unload, split_projections


def test_transformers_models(tmp_path):
    """GPT-2's c_attn and Phi-3's qkv_proj and gate_up_proj, within their models."""
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
    common = {"vocab_size": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    gpt2 = transformers.GPT2Config(n_positions=16, n_embd=16, n_layer=1, n_head=2, **common)
    phi3 = transformers.Phi3Config(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        **common,
    )
    phi3_parts = {"qkv_proj": {"q": 16, "k": 8, "v": 8}, "gate_up_proj": ("gate", "up")}
    for config, cls, parts, count in (
        (gpt2, transformers.GPT2LMHeadModel, {"c_attn": ("q", "k", "v")}, 3),
        (phi3, transformers.Phi3ForCausalLM, phi3_parts, 5),
    ):
        torch.manual_seed(0)
        base = cls(config).eval()
        model, ids = copy.deepcopy(base), torch.arange(3, 13)[None]
        split_projections(model, parts)
        names = [name for each in parts.values() for name in each]
        apply_dash(model, DashConfig(r=2, directions=1, target_modules=names))
        assert len(dash_layers(model)) == count
        model(input_ids=ids, labels=ids).loss.backward()
        with torch.no_grad():
            for layer in dash_layers(model).values():
                for t in (layer.lora_b, layer.dash_sigma, layer.dash_u, layer.dash_vt):
                    t.normal_(std=0.3)
        y = model(ids).logits.detach()
        export_lora(model, tmp_path / cls.__name__)
        served = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / cls.__name__).eval()
        torch.testing.assert_close(served(ids).logits, y, rtol=1e-4, atol=1e-4)
        merge_and_unload(model)
        torch.testing.assert_close(model(ids).logits, y, rtol=1e-4, atol=1e-4)
