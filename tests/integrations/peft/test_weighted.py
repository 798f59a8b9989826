"""Adapters that PEFT computes from others: before launch as plain LoRA's; afterwards in layers that are smaller than their rank."""

from __future__ import annotations

import copy

import pytest
import torch

pytest.importorskip("peft", reason="needs PEFT")
pytest.importorskip("transformers", reason="needs transformers")

from peft import LoraConfig, get_peft_model
from support.peft_models import OUT, Net, adapted, config, gap, layers_of, train
from torch import nn

SETTINGS = {"r": 4, "target_modules": ["first", "middle", "last"]}


def update_of(model, name):
    layer = layers_of(model)[f"base_model.model.{name}"]
    x = torch.eye(layer.in_features)
    with torch.no_grad():
        return layer(x) - layer.base_layer(x)


@pytest.mark.parametrize("full", [True, False])
def test_a_rank_above_the_layers_own(full):
    """r + s is more than the smallest layer has; PEFT's decomposition gives it fewer rows and columns than its adapter has."""
    model = train(adapted(r=OUT, directions=OUT))
    before = {name: update_of(model, name) for name in ("first", "middle", "last")}
    model.add_adapter("none", config(r=OUT, directions=OUT))
    model.add_weighted_adapter(["default", "none"], [1.0, 1.0], "sum", "svd", svd_full_matrices=full)
    assert model.peft_config["sum"].r == 2 * OUT
    model.set_adapter("sum")
    for name, want in before.items():
        assert gap(update_of(model, name), want) < 1e-4, name
    train(model)


@pytest.mark.parametrize("combination", ["svd", "cat"])
def test_launched_adapters_of_a_rank_between_a_layers_sides(combination):
    """r + s = 16 of a layer from 10 to 20 features; both combinations are exact sums of the updates."""
    wide = config(r=8, directions=8, target_modules=["0"], init_lora_weights=False)
    model = get_peft_model(nn.Sequential(nn.Linear(10, 20)), wide)
    model.add_adapter("other", copy.deepcopy(wide))
    (layer,) = layers_of(model).values()
    for name in ("default", "other"):
        layer.lora_dash_launched[name].fill_(True)
        for tensor in (layer.lora_dash_sigma[name].data, layer.lora_dash_u[name], layer.lora_dash_vt[name]):
            tensor.normal_()
    model.add_weighted_adapter(["default", "other"], [1.0, 0.5], "sum", combination)
    want = layer.get_delta_weight("default") + 0.5 * layer.get_delta_weight("other")
    torch.testing.assert_close(layer.get_delta_weight("sum"), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("combination", ["svd", "cat", "linear", "ties", "ties_svd", "magnitude_prune"])
def test_before_launch_adapters_combine_as_plain_ones(combination, rslora):
    """Whatever their scalings are. PEFT leaves rsLoRA's in the new adapter's settings, which does not hold there."""
    models = []
    for kind in (LoraConfig, config):
        model = get_peft_model(Net(), kind(**SETTINGS, lora_alpha=4, use_rslora=rslora))
        model.add_adapter("other", kind(**SETTINGS, lora_alpha=20))
        torch.manual_seed(1)
        for layer in lora_layers(model):
            for name in ("default", "other"):
                nn.init.normal_(layer.lora_A[name].weight)
                nn.init.normal_(layer.lora_B[name].weight)
        model.add_weighted_adapter(["default", "other"], [0.3, 0.9], "sum", combination, density=0.5)
        if kind is LoraConfig:
            for layer in lora_layers(model):
                layer.scaling["sum"] = 1.0
        model.set_adapter("sum")
        models.append(model)
    assert models[0].peft_config["sum"].r == models[1].peft_config["sum"].r
    for plain, ours in zip(*map(lora_layers, models), strict=True):
        assert gap(plain.get_delta_weight("sum"), ours.get_delta_weight("sum")) < 1e-4


def lora_layers(model):
    return [module for module in model.modules() if hasattr(module, "lora_A")]
