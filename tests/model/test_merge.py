"""Merging: exact under every mode, all layers or none, and no trace in the state dict."""

from __future__ import annotations

import copy

import loradash
import pytest
import torch
from loradash import DashConfig, DashLinear, apply_dash, dash_layers, merge, unmerge
from torch import nn
from torch.nn.utils import prune

WIDTH = 48


def trained(*layers, std=0.5, **settings):
    torch.manual_seed(0)
    layers = layers or (nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH))
    model = apply_dash(nn.Sequential(*layers), DashConfig(r=4, directions=4, **settings))
    for layer in dash_layers(model).values():
        nn.init.normal_(layer.lora_b, std=std)
    return model.eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_merged_weights_are_rounded_once(dtype):
    """W + ΔW in float32 or wider, rounded to the weight's dtype: under autocast too."""
    model = trained(nn.Linear(WIDTH, WIDTH).to(dtype))
    layer = model[0]
    wide = torch.promote_types(dtype, torch.float32)
    expected = (layer.weight.detach().to(wide) + layer.delta()).to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        merge(model)
    assert torch.equal(layer.weight, expected)


def test_the_state_dict_is_that_of_an_unmerged_model():
    model = trained()
    keys, total = list(model.state_dict()), sum(p.numel() for p in model.parameters())
    merge(model)
    assert list(model.state_dict()) == keys
    assert sum(p.numel() for p in model.parameters()) == loradash.summary(model).total == total


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: model])
def test_the_original_goes_along(copied):
    """Moved, converted or copied while merged: what comes back is the original in its new dtype."""
    model = trained()
    original = model[0].weight.detach().clone()
    merge(model)
    other = copied(model).to(torch.bfloat16)
    unmerge(other)
    assert torch.equal(other[0].weight, original.bfloat16())


def test_tied_weights_stay_tied():
    embedding, head = nn.Embedding(9, WIDTH), nn.Linear(WIDTH, 9, bias=False)
    head.weight = embedding.weight
    model = trained(embedding, head)
    merge(model)
    assert model[1].weight is not model[0].weight
    model.half()
    unmerge(model)
    assert model[1].weight is model[0].weight and model[0].weight.dtype == torch.float16


@pytest.mark.parametrize("bad", [0, 1])
def test_all_layers_or_none(bad):
    model = trained(nn.Linear(WIDTH, WIDTH).half(), nn.Linear(WIDTH, WIDTH).half())
    before = {n: p.clone() for n, p in model.state_dict().items()}
    nn.init.constant_(model[bad].lora_a, 300.0)
    nn.init.constant_(model[bad].lora_b, 300.0)
    with pytest.raises(ValueError, match=rf"{bad}: the merged weight reaches .* not finite in torch.float16"):
        merge(model)
    assert not any(layer.merged for layer in dash_layers(model).values())
    assert all(torch.equal(p, before[n]) for n, p in model.state_dict().items() if "lora" not in n)


def test_a_merged_layer_refuses_what_would_be_lost():
    model = trained()
    state = model.state_dict()
    merge(model)
    with pytest.raises(ValueError, match=r"0 is merged; unmerge\(model\) before load_state_dict"):
        model.load_state_dict(state)
    unmerge(model)
    model.load_state_dict(state)


def test_an_adapter_alone_is_refused_by_a_merged_layer():
    """Its update is in the weight: nothing would change."""
    for base in (nn.Linear(WIDTH, WIDTH), hooked()):
        model = trained(base)
        state = {key: value.clone() for key, value in model.state_dict().items()}
        merge(model)
        for part in (
            {k: v for k, v in state.items() if "lora" in k},
            {k: v for k, v in state.items() if "weight" in k},
        ):
            with pytest.raises(ValueError, match="0 is merged"):
                model.load_state_dict(part, strict=False)


def test_the_state_of_a_merged_model_is_refused_by_adapters(tmp_path):
    """W + ΔW, and ΔW again."""
    model = trained()
    merge(model)
    torch.save(model.state_dict(), tmp_path / "merged.pt")
    state = torch.load(tmp_path / "merged.pt")
    with pytest.raises(ValueError, match="0: the state dict is that of a merged model"):
        trained().load_state_dict(state)
    plain = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH))
    plain.load_state_dict(state, strict=False)
    x = torch.randn(3, WIDTH)
    torch.testing.assert_close(plain(x), model(x))
    unmerge(model)
    trained().load_state_dict(model.state_dict())


def test_tying_anew_while_merged_is_refused():
    """The embedding has the weight before the merge: with it the update would be lost."""
    embedding, head = nn.Embedding(9, WIDTH), nn.Linear(WIDTH, 9, bias=False)
    head.weight = embedding.weight
    model = trained(embedding, head)
    merge(model)
    with pytest.raises(ValueError, match="1 is merged, and would lose its update"):
        model[1].weight = embedding.weight
    unmerge(model)
    model[1].weight = embedding.weight


@pytest.mark.parametrize(
    "change",
    [nn.utils.parametrizations.weight_norm, lambda layer, name: prune.l1_unstructured(layer, name, 0.5)],
    ids=["parametrized", "pruned"],
)
def test_a_weight_that_is_computed_cannot_be_merged(change):
    """Parametrized or pruned after it was adapted: refused, and the update stays."""
    model, x = trained(), torch.randn(3, WIDTH)
    change(model[0], "weight")
    expected = model(x)
    with pytest.raises(ValueError, match=r"0: .* cannot take the update"):
        merge(model)
    assert not model[0].merged
    assert torch.equal(model(x), expected)


class Product(nn.Linear):
    """A forward of its own that comes to the same, as Falcon's layers have."""

    def forward(self, x):
        return x @ self.weight.t() + self.bias


class Other(nn.Linear):
    """One that does not."""

    def __init__(self, forward):
        super().__init__(WIDTH, WIDTH)
        self._forward = forward

    def forward(self, x):
        return self._forward(super().forward(x))


def hooked():
    layer = nn.Linear(WIDTH, WIDTH)
    layer.register_forward_hook(lambda *_: None)
    return layer


@pytest.mark.parametrize("make", [hooked, lambda: Product(WIDTH, WIDTH)])
def test_layers_kept_whole_that_can_be_merged(make):
    base = make()
    model, x = trained(base), torch.randn(3, WIDTH)
    expected, weight = model(x), base.weight
    merge(model)
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)
    unmerge(model)
    assert base.weight is weight and torch.equal(model(x), expected)


@pytest.mark.parametrize("change", [torch.relu, lambda y: 3 * y, lambda y: y.round(decimals=2), lambda y: y.flip(-1)])
def test_layers_kept_whole_that_cannot_be_merged(change):
    with pytest.raises(ValueError, match="0: Other computes in a way of its own and cannot take the update"):
        merge(trained(Other(change)))


def test_a_weight_that_is_not_there_cannot_be_merged():
    with torch.device("meta"):
        meta = DashLinear(WIDTH, WIDTH)
    with pytest.raises(ValueError, match="DashLinear: its weight is on meta"):
        meta.merge()
