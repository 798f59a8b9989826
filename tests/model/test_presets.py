"""The paper's settings: their sources, and that they fit models of the architectures that they are for."""

from __future__ import annotations

import dataclasses
import re

import pytest
import torch
from loradash import DashConfig, DashSchedule, apply_dash, dash_layers, dash_parameter_groups
from loradash.cli import app
from loradash.config import matches
from loradash.presets import PRESETS, settings
from typer.testing import CliRunner


def llama():
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model = transformers.LlamaForCausalLM(config)
    tokens = torch.randint(0, 64, (2, 8))
    return model, lambda: model(input_ids=tokens, labels=tokens).loss


def deberta():
    transformers = pytest.importorskip("transformers")
    config = transformers.DebertaV2Config(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        relative_attention=True,
        position_buckets=8,
        share_att_key=True,
        pos_att_type=["p2c", "c2p"],
        norm_rel_ebd="layer_norm",
    )
    model = transformers.DebertaV2ForSequenceClassification(config)
    tokens = torch.randint(0, 64, (2, 8))
    return model, lambda: model(input_ids=tokens, labels=torch.tensor([0, 1])).loss


def sdxl():
    diffusers = pytest.importorskip("diffusers")
    model = diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(2, 4),
        norm_num_groups=8,
        cross_attention_dim=32,
        transformer_layers_per_block=(1, 2),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=64,
    )
    conditions = {"text_embeds": torch.randn(1, 16), "time_ids": torch.zeros(1, 6)}
    x, text = torch.randn(1, 4, 8, 8), torch.randn(1, 5, 32)
    return model, lambda: model(x, 1, text, added_cond_kwargs=conditions).sample.square().mean()


# How many layers the preset adapts: blocks, attentions of a block, layers of each.
MODELS = {
    "commonsense-llama-7b": (llama, 2 * 5),
    "commonsense-llama2-7b": (llama, 2 * 5),
    "commonsense-llama3-8b": (llama, 2 * 5),
    "glue-deberta-v3-base": (deberta, 2 * 6),
    "dreambooth-sdxl": (sdxl, (2 + 2 + 2 * 2) * 2 * 4),
}


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_fits_its_architecture(name):
    """Every name it targets is there and adapted; after a few steps the dash phase starts."""
    make, count = MODELS[name]
    torch.manual_seed(0)
    model, loss = make()
    config = DashConfig.preset(name, prelaunch_steps=2)
    apply_dash(model, config)
    layers = dash_layers(model)
    assert len(layers) == count
    assert all(any(matches(layer, [target]) for layer in layers) for target in config.target_modules)
    optimizer = torch.optim.AdamW(dash_parameter_groups(model, PRESETS[name].training.get("learning_rate", 1e-3)))
    schedule = DashSchedule(model, progress=False)
    for _ in range(3):
        loss().backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    assert all(bool(layer.launched) for layer in layers.values())
    assert all(bool(layer.dash_sigma.any()) for layer in layers.values())


def test_the_numbers():
    """Against the authors' scripts, read anew: r, alpha, dropout, learning rate, batch."""
    rows = {
        name: (
            *(preset.config.get(k) for k in ("r", "alpha", "dropout")),
            *map(preset.training.get, ("learning_rate", "batch_size")),
        )
        for name, preset in PRESETS.items()
    }
    assert rows == {
        "commonsense-llama-7b": (32, 64, 0.05, 2e-4, 16),
        "commonsense-llama2-7b": (32, 64, 0.05, 2e-4, 16),
        "commonsense-llama3-8b": (32, 64, 0.05, 1e-4, 16),
        "glue-deberta-v3-base": (2, 4, None, None, None),
        "dreambooth-sdxl": (4, 4, 0.0, 1e-4, 4),
    }
    assert all((p.config["directions"], p.config["prelaunch_steps"]) == (8, 100) for p in PRESETS.values())


def test_overrides():
    assert DashConfig.preset("commonsense-llama-7b", r=16).alpha == 32
    assert DashConfig.preset("glue-deberta-v3-base", r=8).scaling == 2
    config = DashConfig.preset("dreambooth-sdxl", r=8, alpha=3, target_modules=["to_q"])
    assert (config.r, config.alpha, config.target_modules) == (8, 3, ["to_q"])
    assert settings("dreambooth-sdxl")["target_modules"] == ["to_q", "to_k", "to_v", "to_out.0"]


def test_bad_input():
    for name in ("llama", None, ["dreambooth-sdxl"]):
        with pytest.raises(ValueError, match=rf"^no preset {re.escape(repr(name))}; there are {', '.join(PRESETS)}$"):
            DashConfig.preset(name)
    with pytest.raises(ValueError, match=r"unknown settings \['rank'\]"):
        DashConfig.preset("dreambooth-sdxl", rank=4)
    for r in (0, True, "8", 2.5, None, float("nan")):
        with pytest.raises(ValueError, match=r"^r must be an integer of at least 1"):
            DashConfig.preset("dreambooth-sdxl", r=r)


@pytest.mark.parametrize("name", PRESETS)
def test_every_setting_has_a_source(name):
    preset = PRESETS[name]
    known = {field.name for field in dataclasses.fields(DashConfig)}
    assert set(preset.config) <= known and not set(preset.training) & known
    # What no source gives has no value, and another r can keep the ratio.
    assert not set(preset.missing) & {*preset.config, *preset.training}
    assert preset.config["alpha"] % preset.config["r"] == 0
    assert set(preset.sources) - {"*"} <= {*preset.config, *preset.training}
    text = str(preset)
    assert all(f"{k}: {v!r}  (" in text for k, v in {**preset.config, **preset.training}.items())
    assert all(f"{setting}: in no source" in text for setting in preset.missing)
    with pytest.raises(KeyError):
        preset.source("seed")


def test_the_command():
    runner = CliRunner(env={"COLUMNS": "80"})
    table = runner.invoke(app, ["presets"])
    assert table.exit_code == 0 and all(name in table.output for name in PRESETS)
    one = runner.invoke(app, ["presets", "dreambooth-sdxl"])
    assert one.exit_code == 0 and str(PRESETS["dreambooth-sdxl"]) in one.output
    unknown = runner.invoke(app, ["presets", "llama"])
    assert unknown.exit_code == 1 and "no preset 'llama'; there are commonsense-llama-7b" in unknown.output
