"""LORADASH layers in PEFT: their numbers beside the formula, in every state that PEFT can bring them into."""

from __future__ import annotations

import copy
import pickle

import loradash
import pytest
import torch
from torch import nn

pytest.importorskip("peft", reason="needs PEFT")
pytest.importorskip("transformers", reason="needs transformers")

from peft import PeftType, get_peft_model
from support.peft_models import (
    TOLERANCE,
    Net,
    X,
    adapted,
    check_layers,
    config,
    formula,
    gap,
    layers_of,
    output,
    train,
    two_adapters,
)

OPTIONS = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "patterns": {"rank_pattern": {"first": 6}, "alpha_pattern": {"middle": 3}},
    "lora_bias": {"lora_bias": True, "target_modules": ["first", "middle"]},
    "no directions": {"directions": 0},
    "more directions than the layer has": {"directions": 100},
    "gaussian": {"init_lora_weights": "gaussian"},
    "orthogonal": {"init_lora_weights": "orthogonal"},
}


@pytest.fixture(scope="module")
def two():
    """A trained network with two launched adapters, "default" active."""
    return two_adapters()


@pytest.fixture
def both():
    return two_adapters()


def test_the_type_is_one_of_pefts():
    assert PeftType.LORADASH is PeftType("LORADASH") is PeftType["LORADASH"]
    assert PeftType.LORADASH in PeftType and "LORADASH" in list(PeftType)
    assert PeftType.LORADASH == "LORADASH" and PeftType.LORADASH.value == PeftType.LORADASH.name == "LORADASH"
    assert pickle.loads(pickle.dumps(PeftType.LORADASH)) is copy.deepcopy(PeftType.LORADASH) is PeftType.LORADASH
    assert config().peft_type is PeftType.LORADASH


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_layers_compute_the_formula_before_and_after_launch(options):
    model = train(adapted(**options), 1)
    check_layers(model, ["default"])
    assert not any(layer.launched for layer in loradash.dash_layers(model).values())
    train(model, 3)
    check_layers(model, ["default"])
    for name, view in loradash.dash_layers(model).items():
        s = min(options.get("directions", 3), view.in_features, view.out_features)
        assert view.dash_sigma.shape == (s,)
        assert bool(view.launched) is bool(s) and bool(view.dash_sigma.any()) is bool(s), name


def test_gradients_are_those_of_the_formula(two):
    for layer in layers_of(two).values():
        tensors = [layer.lora_A["default"].weight, layer.lora_B["default"].weight, layer.lora_dash_sigma["default"]]
        x = torch.randn(7, layer.in_features, generator=torch.Generator().manual_seed(4), requires_grad=True)
        ours = torch.autograd.grad(layer(x).sin().sum(), [x, *tensors])
        theirs = torch.autograd.grad(formula(layer, ["default"], x).sin().sum(), [x, *tensors])
        for got, want in zip(ours, theirs, strict=True):
            assert gap(got, want) < TOLERANCE * float(want.abs().max())


def test_a_frozen_vector_never_trains(both):
    both.train()
    both.set_adapter("other")
    both.set_requires_grad("default") if hasattr(both, "set_requires_grad") else None
    trained = {name for name, p in both.named_parameters() if p.requires_grad}
    assert trained and all(".lora_A." in n or ".lora_B." in n or ".lora_dash_sigma." in n for n in trained)
    assert not any(b.requires_grad for b in both.buffers())


def test_several_active_adapters_add_up(both):
    both.base_model.set_adapter(["default", "other"])
    check_layers(both, ["default", "other"])


def test_a_scale_is_one_of_both_terms(two):
    layer = copy.deepcopy(layers_of(two)["base_model.model.first"])
    base, whole = layer.base_layer(X), layer(X)
    layer.set_scale("default", 0.5)
    assert gap(layer(X), base + 0.5 * (whole - base)) < TOLERANCE
    layer.scale_layer(4)
    assert gap(layer(X), base + 2 * (whole - base)) < TOLERANCE
    layer.merge()
    assert gap(layer(X), base + 2 * (whole - base)) < TOLERANCE
    layer.unmerge()
    layer.unscale_layer(None)
    assert gap(layer(X), whole) < TOLERANCE


@pytest.mark.parametrize("safe", [False, True])
def test_merging(both, safe):
    before, weight = output(both), both.base_model.model.middle.weight.clone()
    both.merge_adapter(safe_merge=safe)
    assert all(view.merged for view in loradash.dash_layers(both).values())
    assert gap(output(both), before) < TOLERANCE and gap(both.base_model.model.middle.weight, weight) > 0.01
    with both.disable_adapter():
        assert gap(output(both), output(Net())) < TOLERANCE
    both.merge_adapter(safe_merge=safe)
    both.unmerge_adapter()
    assert gap(output(both), before) < TOLERANCE and gap(both.base_model.model.middle.weight, weight) < 1e-6
    assert gap(output(both.merge_and_unload(safe_merge=safe)), before) < TOLERANCE


def test_merging_by_name(both):
    both.set_adapter("other")
    other = output(both)
    both.set_adapter("default")
    both.merge_adapter(adapter_names=["other"])
    assert gap(output(both), other) < TOLERANCE
    both.unmerge_adapter()
    plain = both.merge_and_unload(adapter_names=["default", "other"])
    assert not layers_of(plain) and gap(output(plain), other) > 0.01


def test_a_damaged_adapter_is_not_merged_safely(both):
    before = both.base_model.model.first.base_layer.weight.clone()
    layers_of(both)["base_model.model.first"].lora_dash_sigma["default"].data[0] = torch.nan
    with pytest.raises(ValueError, match="NaN"):
        both.merge_adapter(safe_merge=True)
    assert torch.equal(both.base_model.model.first.base_layer.weight, before)


def test_disabled_adapters_leave_the_base_model(both):
    before = output(both)
    with both.disable_adapter():
        assert torch.equal(output(both), output(Net()))
    assert torch.equal(output(both), before)


def test_a_mixed_batch_is_its_rows_one_by_one(both):
    names = ["other", "default", "__base__", "other", "default", "default"]
    alone = {"__base__": output(Net())}
    for name in ("other", "default"):
        both.set_adapter(name)
        alone[name] = output(both)
    mixed = output(both, adapter_names=names)
    assert gap(mixed, torch.stack([alone[name][i] for i, name in enumerate(names)])) < TOLERANCE
    with pytest.raises(ValueError, match="non-existing"):
        output(both, adapter_names=["nobody"] * 6)


def test_no_hook_is_left_after_an_exception(both):
    before = output(both)
    own = both.base_model.model.head.register_forward_pre_hook(lambda *_: None)
    with pytest.raises(RuntimeError, match=r"shape|size"):
        both(torch.randn(2, 3), adapter_names=["other", "default"])
    assert not any(m._forward_pre_hooks for m in both.modules() if m is not both.base_model.model.head)
    assert len(both.base_model.model.head._forward_pre_hooks) == 1
    own.remove()
    assert torch.equal(output(both), before)


def test_dropout_is_one_mask_for_both_terms_and_none_in_evaluation():
    model = train(adapted(lora_dropout=0.5))
    assert torch.equal(output(model), output(model))
    layer = layers_of(model)["base_model.model.first"].train()
    x = torch.ones(20000, layer.in_features)
    with torch.no_grad():
        update = layer(x) - layer.base_layer(x)
    full = (formula(layer, ["default"], x[:1]) - layer.base_layer(x[:1]).double())[0]
    assert gap(update.double().mean(0), full) < 0.05 * float(full.abs().max())
    # With p = 1/2 an input's mask is 0 or 2, so the variance is the sum over inputs of their squared parts.
    a, b = layer.folded("default")
    parts = (b.double() @ a.double()).pow(2).sum(1)
    assert gap(update.double().var(0), parts) < 0.1 * float(parts.max())


def test_16_bits_and_autocast():
    reference = train(adapted())
    low = get_peft_model(Net().to(torch.bfloat16), config())
    assert {t.dtype for n, t in low.state_dict().items() if "lora_A" in n or "sigma" in n or "dash_u" in n} == {
        torch.float32
    }
    low.load_state_dict({k: v for k, v in reference.state_dict().items() if "lora_" in k}, strict=False)
    low.eval()
    assert output(low).dtype == torch.bfloat16
    assert gap(output(low), output(reference)) < 0.05 * float(output(reference).abs().max())
    before = output(low)
    assert gap(output(low.merge_and_unload()), before) < 0.03 * float(before.abs().max())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert gap(output(reference), output(Net())) > 0.01
        y = output(reference)
    assert gap(y, output(reference)) < 0.05 * float(output(reference).abs().max())


def test_adapters_in_the_base_models_dtype():
    model = get_peft_model(Net().to(torch.bfloat16), config(), autocast_adapter_dtype=False)
    kinds = {n.split("lora_")[1].split(".")[0]: t.dtype for n, t in model.state_dict().items() if "lora_" in n}
    assert {kinds[part] for part in ("A", "B", "dash_sigma")} == {torch.bfloat16}
    # What is kept as it was chosen, and what counts, is not rounded.
    assert kinds["dash_u"] == kinds["dash_vt"] == torch.float32
    assert kinds["dash_step"] == torch.int64 and kinds["dash_launched"] == torch.bool
    for layer in layers_of(train(model)).values():
        x = torch.randn(5, layer.in_features).to(torch.bfloat16)
        want = formula(layer, ["default"], x)
        assert gap(layer(x), want) < 0.03 * float(want.abs().max())


def test_float64():
    model = get_peft_model(Net().double(), config())
    train(model)
    check_layers(model, ["default"], 1e-10, torch.float64)


@pytest.mark.parametrize("size", [2e-6, 1e-5, 3e-5, 1e-4])
def test_a_second_adapter_after_merging_sees_the_merged_weight(size):
    """PEFT merges through weight.data, which bumps no version: copies of the old weight must not be used."""
    for trial in range(10):
        torch.manual_seed(trial)
        base = nn.Sequential(nn.Linear(64, 64)).to(torch.bfloat16)
        model = get_peft_model(base, config(target_modules=["0"])).eval()
        layer, x = model.base_model.model[0], torch.randn(64, 64, dtype=torch.bfloat16)
        with torch.no_grad():
            layer.lora_B["default"].weight.normal_(std=size)
            for _ in range(3):
                model(x)
            merged = model.merge_and_unload()
            second = get_peft_model(merged, config(target_modules=["0"])).eval()
            assert torch.equal(
                second(x), nn.functional.linear(x, merged[0].base_layer.weight, merged[0].base_layer.bias)
            )


def test_layers_with_hooks_on_their_parts_call_them(both):
    layer = layers_of(both)["base_model.model.first"]
    want, seen = layer(X), []
    layer.lora_A["default"].register_forward_hook(lambda *_: seen.append(1))
    assert gap(layer(X), want) < TOLERANCE and seen == [1]


def test_deleting_and_adding_again(both):
    state = loradash.dash_state(both)
    before = output(both)
    both.delete_adapter("other")
    assert torch.equal(output(both), before)
    both.delete_adapter("default")
    with pytest.raises(ValueError, match="one LORADASH adapter at a time"):
        loradash.dash_state(both)
    both.add_adapter("default", config())
    both.set_adapter("default")
    assert loradash.dash_state(both) is not state and loradash.dash_state(both).step == 0
    train(both)


@pytest.mark.parametrize("combination", ["svd", "cat", "linear"])
def test_weighted_adapters_hold_the_dash_terms(both, combination):
    both.base_model.set_adapter(["default", "other"])
    base, summed = output(Net()), layer_update(both)
    both.set_adapter("default")
    one, before = layer_update(both), output(both)
    if combination == "linear":
        both.add_weighted_adapter(["default"], [0.5], "sum", combination)
        want = 0.5 * one
    else:
        both.add_weighted_adapter(["default", "other"], [1.0, 1.0], "sum", combination, svd_rank=12)
        want = summed
    assert torch.equal(output(both), before)
    both.set_adapter("sum")
    assert gap(layer_update(both), want) < 1e-4
    assert not any(view.launched for view in loradash.dash_layers(both).values())
    assert gap(output(both), base) > 0.01


def layer_update(model):
    layer = layers_of(model)["base_model.model.last"]
    x = torch.eye(layer.in_features)
    with torch.no_grad():
        return layer(x) - layer.base_layer(x)


def test_copies_and_pickles(both):
    before = output(both)
    for twin in (copy.deepcopy(both), pickle.loads(pickle.dumps(both))):
        assert torch.equal(output(twin), before)
        assert loradash.dash_state(twin).step == loradash.dash_state(both).step == 3
        loradash.dash_state(twin).step = 7
        assert loradash.dash_state(both).step == 3


def test_a_view_is_its_layer_and_adapter(both):
    first, again = loradash.dash_layers(both), loradash.dash_layers(both)
    assert list(first) == ["first", "middle", "last"]
    assert first == again and set(first.values()) == set(again.values())
    both.set_adapter("other")
    assert not set(first.values()) & set(loradash.dash_layers(both).values())
    view = first["middle"]
    assert (view.in_features, view.out_features, view.config.r, view.scaling) == (40, 40, 4, 2.0)
    assert torch.equal(view.weight_nk(), view.layer.base_layer.weight.t()) and view.base is None


def test_parts_whose_forward_was_replaced_are_called():
    layer = layers_of(two_adapters())["base_model.model.first"]
    x = torch.randn(3, layer.in_features)
    lora_a = layer.lora_A["default"]
    with torch.no_grad():
        before = layer(x)
        pefts = lora_a.forward
        lora_a.forward = lambda x: pefts(x) * 0
        assert gap(layer(x), before) > 1e-3
        del lora_a.forward
        # What FSDP1 makes of a parameter that it keeps in another.
        weight = lora_a._parameters.pop("weight")
        lora_a.__dict__["weight"] = weight.detach()
        assert gap(layer(x), before) < TOLERANCE
