"""Whole models of transformers, tiny and random, through everything: apply, train, launch, save, load, export, merge."""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass
from typing import Any

import loradash
import pytest
import torch
from loradash import DashConfig, DashSchedule, apply_dash, dash_layers
from torch import nn

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

IDS = torch.arange(48).view(4, 12) % 89 + 5
DECODER = {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 32, "vocab_size": 97}
LLAMA = {**DECODER, "intermediate_size": 48, "num_key_value_heads": 2, "pad_token_id": 0}


@dataclass(frozen=True)
class Trial:
    """A model's class, its settings and inputs, and what of it is adapted."""

    model: str
    settings: dict[str, Any]
    inputs: dict[str, torch.Tensor]
    targets: tuple[str, ...] | None = None
    exclude: tuple[str, ...] | None = None
    # What apply_dash says of the model as a whole, where it refuses.
    stays: str | None = None
    # What export_lora says, where PEFT would give other outputs.
    unserved: str | None = None


def text(
    model: str, stays: str | None = None, exclude: tuple[str, ...] | None = None, targets=None, **settings
) -> Trial:
    return Trial(model, settings, {"input_ids": IDS}, targets, exclude, stays)


IMAGES = {"pixel_values": torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(1))}
AUDIO = {"input_values": torch.randn(4, 400, generator=torch.Generator().manual_seed(1))}
VISION = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "image_size": 16,
    "patch_size": 8,
}
SEQ2SEQ = {
    "vocab_size": 97,
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
}
WAVES = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "conv_dim": (32,),
    "conv_stride": (5,),
    "conv_kernel": (10,),
    "num_feat_extract_layers": 1,
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
}

TRIALS = {
    "llama": text("LlamaForCausalLM", **LLAMA),
    "llama-tied": text("LlamaForCausalLM", tie_word_embeddings=True, **LLAMA),
    "qwen2": text("Qwen2ForCausalLM", **LLAMA),
    "qwen3": text("Qwen3ForCausalLM", head_dim=8, **LLAMA),
    "mistral": text("MistralForCausalLM", **LLAMA),
    "mixtral": text("MixtralForCausalLM", num_local_experts=4, num_experts_per_tok=2, **LLAMA),
    "gemma2": text("Gemma2ForCausalLM", head_dim=8, **LLAMA),
    "phi3": text("Phi3ForCausalLM", **LLAMA),
    "olmo2": text("Olmo2ForCausalLM", **LLAMA),
    "gpt2": text("GPT2LMHeadModel", vocab_size=97, n_embd=32, n_layer=2, n_head=4),
    "gpt-neox": text("GPTNeoXForCausalLM", intermediate_size=48, **DECODER),
    "opt": text("OPTForCausalLM", ffn_dim=48, word_embed_proj_dim=32, **DECODER),
    "falcon": text("FalconForCausalLM", **DECODER),
    "bloom": text(
        "BloomForCausalLM",
        stays="BloomAttention.forward",
        exclude=("dense", "dense_4h_to_h"),
        vocab_size=97,
        hidden_size=32,
        n_layer=2,
        n_head=4,
    ),
    "mamba": text(
        "MambaForCausalLM",
        stays="MambaMixer",
        exclude=("x_proj", "dt_proj", "out_proj"),
        vocab_size=97,
        hidden_size=32,
        num_hidden_layers=2,
        state_size=8,
    ),
    "bert": text("BertForSequenceClassification", intermediate_size=48, num_labels=3, **DECODER),
    "roberta": text("RobertaForTokenClassification", intermediate_size=48, max_position_embeddings=64, **DECODER),
    "distilbert": text("DistilBertForQuestionAnswering", vocab_size=97, dim=32, n_layers=2, n_heads=4, hidden_dim=48),
    "deberta-v2": text("DebertaV2ForSequenceClassification", intermediate_size=48, **DECODER),
    "electra": text("ElectraForPreTraining", intermediate_size=48, embedding_size=24, **DECODER),
    "t5": Trial(
        "T5ForConditionalGeneration",
        {
            "vocab_size": 97,
            "d_model": 32,
            "d_kv": 8,
            "d_ff": 48,
            "num_layers": 1,
            "num_heads": 4,
            "decoder_start_token_id": 0,
        },
        {"input_ids": IDS, "decoder_input_ids": IDS[:, :6]},
    ),
    "bart": Trial("BartForConditionalGeneration", SEQ2SEQ, {"input_ids": IDS, "decoder_input_ids": IDS[:, :6]}),
    "whisper": Trial(
        "WhisperForConditionalGeneration",
        {
            **SEQ2SEQ,
            "num_mel_bins": 8,
            "max_source_positions": 10,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "decoder_start_token_id": 1,
        },
        {
            "input_features": torch.randn(4, 8, 20, generator=torch.Generator().manual_seed(1)),
            "decoder_input_ids": IDS[:, :6],
        },
    ),
    "vit": Trial("ViTForImageClassification", {**VISION, "num_labels": 3}, IMAGES),
    "dinov2": Trial("Dinov2Model", VISION, IMAGES),
    "siglip": Trial("SiglipVisionModel", VISION, IMAGES, unserved="MultiheadAttention reads the weight of this layer"),
    "wav2vec2": Trial("Wav2Vec2Model", WAVES, AUDIO),
    "wavlm": Trial(
        "WavLMModel",
        WAVES,
        AUDIO,
        stays="WavLMAttention",
        exclude=("q_proj", "k_proj", "v_proj", "out_proj", "projection"),
    ),
}


def build(trial: Trial) -> nn.Module:
    torch.manual_seed(0)
    cls = getattr(transformers, trial.model)
    return cls(cls.config_class(**trial.settings)).eval()


def output(model: nn.Module, trial: Trial) -> torch.Tensor:
    found = model(**trial.inputs)
    for name in ("logits", "pooler_output"):
        if getattr(found, name, None) is not None:
            return getattr(found, name)
    return found[0]


def largest(a: torch.Tensor, b: torch.Tensor) -> float:
    """The largest difference over the largest value."""
    return float((a - b).detach().abs().max() / b.detach().abs().max())


@pytest.mark.parametrize("name", TRIALS)
def test_whole_models(name, tmp_path, record_property):
    trial = TRIALS[name]
    model = build(trial)
    expected = output(model, trial).detach()
    if trial.stays:
        with pytest.raises(ValueError, match=trial.stays):
            apply_dash(model, DashConfig(r=4, directions=4))
    config = DashConfig(
        r=4,
        directions=4,
        prelaunch_steps=2,
        target_modules=trial.targets,
        target_parameters=[],
        exclude_modules=trial.exclude,
    )
    apply_dash(model, config)
    gaps = {"fresh": largest(output(model, trial), expected)}

    schedule = DashSchedule(model, progress=False)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2)
    for _ in range(4):
        optimizer.zero_grad()
        output(model.train(), trial).float().square().mean().backward()
        optimizer.step()
        schedule.step()
    layers = dash_layers(model)
    assert schedule.launched and all(bool(layer.launched) and layer.dash_sigma.any() for layer in layers.values())
    trained = output(model.eval(), trial).detach()
    assert largest(trained, expected) > 1e-3

    again = loradash.load_adapter(build(trial), loradash.save_adapter(model, tmp_path / "own"))
    gaps["loaded"] = largest(output(again, trial), trained)
    with loradash.disable(model):
        gaps["disabled"] = largest(output(model, trial), expected)
    if trial.unserved:
        with pytest.raises(ValueError, match=trial.unserved):
            loradash.export_lora(model, tmp_path / "peft")
    else:
        with warnings.catch_warnings():
            # Models with tied embeddings warn of merging in PEFT; served beside the model, as here, the adapter is right.
            warnings.filterwarnings("ignore", "loradash: the weight of .* is tied to another module's")
            folder = loradash.export_lora(model, tmp_path / "peft")
        served = peft.PeftModel.from_pretrained(build(trial), str(folder)).eval()
        gaps["exported"] = largest(output(served, trial), trained)
    loradash.merge(model)
    gaps["merged"] = largest(output(model, trial), trained)
    loradash.unmerge(model)
    gaps["unmerged"] = largest(output(model, trial), trained)

    for step, gap in gaps.items():
        record_property(step, gap)
    if os.environ.get("LORADASH_SHOW_GAPS"):
        print(f"\n{name}: {len(layers)} layers; " + ", ".join(f"{step} {gap:.1e}" for step, gap in gaps.items()))
    limits = {"loaded": 0.0, "unmerged": 0.0}
    assert all(gap <= limits.get(step, 1e-4) for step, gap in gaps.items()), gaps
