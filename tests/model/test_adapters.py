"""Several adapters in one model: added, switched, counted, saved, merged, deleted."""

from __future__ import annotations

import copy
import pickle

import loradash
import pytest
import torch
from loradash import (
    AdapterError,
    DashConfig,
    DashSchedule,
    SpectralCache,
    active_adapter,
    adapter_names,
    add_adapter,
    apply_dash,
    dash_layers,
    dash_parameter_groups,
    dash_state,
    delete_adapter,
    disable,
    export_lora,
    load_adapter,
    merge,
    merge_adapters,
    merge_and_unload,
    prelaunch,
    save_adapter,
    set_adapter,
    summary,
    train_adapters,
    unmerge,
)
from support.several import BASE, OTHER, X, alone, filled, formula, network, two
from torch import nn


def parameters_of(model, name):
    layers = [m for m in model.modules() if isinstance(m, loradash.DashLinear) and name in m.adapters]
    return [layer.part(name, key) for layer in layers for key in ("lora_a", "lora_b", "dash_sigma")]


def test_one_adapter_is_as_it_was():
    """No key, no submodule, no attribute for the others."""
    model = apply_dash(network(), BASE)
    keys, attributes = list(model.state_dict()), set(vars(model[0]))
    assert keys[:8] == [
        f"0.{k}" for k in ["weight", "bias", "lora_a", "lora_b", "dash_sigma", "dash_u", "dash_vt", "launched"]
    ]
    assert not any("parked" in name for name, _ in model.named_modules()) and "parked" not in repr(model)
    add_adapter(model, "b", OTHER)
    set_adapter(model, "b")
    set_adapter(model, "default")
    delete_adapter(model, "b")
    assert list(model.state_dict())[: len(keys) - 2] == keys[:-2] and set(vars(model[0])) == attributes


def test_each_adapter_computes_its_own_formula():
    model = two()
    assert adapter_names(model) == ["default", "b"] and active_adapter(model) == "default"
    plain = network()(X)
    for name in ("default", "b"):
        torch.testing.assert_close(alone(model, name), formula(model, name), rtol=1e-5, atol=1e-5)
        assert not torch.allclose(alone(model, name), plain, atol=1e-3)
    torch.testing.assert_close(alone(model, None), plain)
    assert list(dash_layers(model)) == ["0", "2"]
    set_adapter(model, "b")
    assert list(dash_layers(model)) == ["2", "4"] and dash_state(model).config == OTHER
    assert "without the active adapter" in repr(model[0]) and "adapters=b, default" in repr(model[2])
    with disable(model):
        torch.testing.assert_close(model(X), plain)


def test_parameters_stay_the_same_and_so_do_their_flags():
    model = two()
    before = {name: parameters_of(model, name) for name in adapter_names(model)}
    assert all(p.requires_grad for p in before["default"]) and not any(p.requires_grad for p in before["b"])
    before["default"][0].requires_grad_(False)
    set_adapter(model, "b")
    assert all(p.requires_grad for p in before["b"]) and not any(p.requires_grad for p in before["default"])
    set_adapter(model, "default")
    assert [p.requires_grad for p in before["default"]] == [False] + [True] * 5
    for name, found in before.items():
        assert [id(p) for p in found] == [id(p) for p in parameters_of(model, name)]


def train(model, schedule, optimizer, steps):
    for _ in range(steps):
        optimizer.zero_grad()
        model(X).square().mean().backward()
        optimizer.step()
        schedule.step()


def trainer(model):
    return DashSchedule(model, progress=False), torch.optim.AdamW(dash_parameter_groups(model, lr=1e-2))


def test_training_in_turns_is_training_apart():
    """Steps, phases, optimizers and directions of each adapter, to the last bit, whatever the other does between."""
    results = {}
    for mode in ("apart", "in turns"):
        model = apply_dash(network(), BASE)
        torch.manual_seed(5)
        add_adapter(model, "b", OTHER)
        if mode == "apart":
            # The other one stays as it is drawn.
            for name in ("default", "b"):
                one = copy.deepcopy(model)
                set_adapter(one, name)
                train(one, *trainer(one), 6)
                results[name] = one(X), dash_state(one).step
            continue
        first = trainer(model)
        set_adapter(model, "b")
        second = trainer(model)
        for name, run in (("default", first), ("b", second)) * 3:
            set_adapter(model, name)
            train(model, *run, 2)
        for name in ("default", "b"):
            set_adapter(model, name)
            assert torch.equal(model(X), results[name][0]) and dash_state(model).step == results[name][1] == 6
        assert first[0].launched and second[0].launched
        with pytest.raises(RuntimeError, match="another adapter is active"):
            first[0].step()


def test_the_schedule_of_a_parked_adapter_leaves_the_active_one_alone():
    model = two(b=OTHER)
    for module in model.modules():
        if "launched" in module._buffers:
            module._buffers["launched"].fill_(False)
    schedule, _ = trainer(model)
    set_adapter(model, "b")
    _, optimizer = trainer(model)
    prelaunch(model, progress=False)
    model(X).sum().backward()
    sigma = model[2].dash_sigma
    assert sigma.grad.any()
    optimizer.step()
    # What is loaded into a parked schedule is its own adapter's.
    schedule.load_state_dict({**schedule.state_dict(), "dash_only": True, "step": 7})
    assert active_adapter(model) == "b" and model[2].lora_a.requires_grad and dash_state(model).step == 0
    # The parked one is in pre-launch, where its own Δσ gets no step.
    assert sigma.grad is not None and sigma.any() and not schedule.launched and not schedule.is_behind
    set_adapter(model, "default")
    assert dash_state(model).dash_only and not model[2].lora_a.requires_grad and dash_state(model).step == 7


def test_directions_are_each_adapters_own_and_the_decomposition_is_shared(tmp_path, monkeypatch):
    from loradash import cache as module

    made, real = [], module.decompose_to_keep
    monkeypatch.setattr(module, "decompose_to_keep", lambda *a: made.append(1) or real(*a))
    same = DashConfig(r=2, directions=3, target_modules=["0", "2"])
    model = apply_dash(network(), BASE)
    add_adapter(model, "b", same)
    for module_ in model.modules():
        if "lora_b" in module_._parameters:
            nn.init.normal_(module_._parameters["lora_b"])
    cache = SpectralCache(tmp_path)
    prelaunch(model, progress=False, cache=cache)
    assert len(made) == 2
    set_adapter(model, "b")
    assert not any(bool(layer.launched) for layer in dash_layers(model).values())
    prelaunch(model, progress=False, cache=cache)
    assert len(made) == 2
    assert model[0].dash_vt.shape == (3, 20) and model[0].part("default", "dash_vt").shape == (2, 20)
    plain = copy.deepcopy(model)
    for layer in dash_layers(plain).values():
        layer.launched.fill_(False)
    prelaunch(plain, progress=False)
    assert torch.equal(plain[0].dash_sigma, model[0].dash_sigma)
    torch.testing.assert_close(
        plain[0].dash_u @ plain[0].dash_vt, model[0].dash_u @ model[0].dash_vt, atol=1e-4, rtol=1e-3
    )


def test_files_of_one_among_several(tmp_path):
    model = two()
    expected = {name: alone(model, name) for name in ("default", "b")}
    for name in expected:
        save_adapter(model, tmp_path / name, adapter=name)
    assert active_adapter(model) == "default"
    other = apply_dash(network(), DashConfig(r=1, directions=0), adapter="mine")
    for name in expected:
        load_adapter(other, tmp_path / name, adapter=name)
    assert adapter_names(other) == ["mine", "default", "b"]
    for name, y in expected.items():
        assert torch.equal(alone(other, name), y)
    # Again, into the one that is there.
    load_adapter(filled(other, seed=3), tmp_path / "b", adapter="b")
    assert torch.equal(alone(other, "b"), expected["b"]) and active_adapter(other) == "mine"
    fresh = load_adapter(network(), tmp_path / "b", adapter="b")
    assert adapter_names(fresh) == ["b"] and torch.equal(fresh(X), expected["b"])
    with pytest.raises(AdapterError, match=r"0\.dash_sigma is missing"):
        load_adapter(other, tmp_path / "b", adapter="default")
    export_lora(model, tmp_path / "peft", adapter="b")
    export_lora(fresh, tmp_path / "same")
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "peft" / file).read_bytes() == (tmp_path / "same" / file).read_bytes()


def test_a_checkpoint_of_a_run_has_them_all(tmp_path):
    """Values and steps of the parked ones too, which are frozen."""

    def run(values, active):
        model = filled(two(), values)
        set_adapter(model, active)
        return model, torch.optim.AdamW(dash_parameter_groups(model, lr=1e-2)), DashSchedule(model, progress=False)

    model, optimizer, schedule = run(1, "b")
    loradash.state.states(model)["default"].step = 7
    model(X).square().mean().backward()
    optimizer.step()
    schedule.step()
    loradash.save_training(tmp_path, model, optimizer, schedule)
    again, *rest = run(2, "b")
    loradash.load_training(tmp_path, again, *rest)
    for name, steps in (("b", 1), ("default", 7)):
        set_adapter(model, name)
        set_adapter(again, name)
        assert torch.equal(model(X), again(X)) and dash_state(again).step == steps
    with pytest.raises(ValueError, match="the adapter 'b' is active, and in the model 'default'"):
        loradash.load_training(tmp_path, *run(2, "default"))
    lone = apply_dash(network(), DashConfig(r=2))
    optimizer, schedule = torch.optim.AdamW(dash_parameter_groups(lone, lr=1e-2)), DashSchedule(lone, progress=False)
    with pytest.raises(ValueError, match="the checkpoint has the adapters b, default, the model has default"):
        loradash.load_training(tmp_path, lone, optimizer, schedule)


def test_a_file_that_cannot_be_added_changes_nothing(tmp_path):
    head = filled(apply_dash(network(), DashConfig(r=2, directions=1, target_modules=["0"], trainable_modules=["4"])))
    save_adapter(head, tmp_path)
    model = two()
    before = repr(model), list(model.state_dict())
    with pytest.raises(
        AdapterError, match=r"adapter 'c' trains parts of the model .*\(trainable_modules, train_bias\)"
    ):
        load_adapter(model, tmp_path, adapter="c")
    assert (repr(model), list(model.state_dict())) == before
    with pytest.raises(ValueError, match="adapter 'default' trains parts of the model"):
        add_adapter(head, "c", BASE)


def test_merged_with_factors():
    model = two()
    deltas = {
        name: {
            n: layer.delta_of(name)
            for n, layer in (("0", model[0]), ("2", model[2]), ("4", model[4]))
            if name in layer.adapters
        }
        for name in ("default", "b")
    }
    factors = {"default": 0.7, "b": -0.25}
    expected = network()
    with torch.no_grad():
        for name, factor in factors.items():
            for n, delta in deltas[name].items():
                expected[int(n)].weight += factor * delta
    merge_adapters(model, factors, "both")
    assert adapter_names(model) == ["default", "b", "both"] and active_adapter(model) == "default"
    assert model[2].part("both", "lora_a").shape == (3 + 2 + 2 + 3, 30)
    torch.testing.assert_close(alone(model, "both"), expected(X), rtol=1e-5, atol=1e-5)
    before, weights = model(X), [layer.weight.clone() for layer in (model[0], model[2], model[4])]
    merge(model, adapters=factors)
    torch.testing.assert_close(model(X), expected(X), rtol=1e-5, atol=1e-5)
    with disable(model):
        torch.testing.assert_close(model(X), network()(X))
    torch.testing.assert_close(model(X), expected(X), rtol=1e-5, atol=1e-5)
    for call in (
        lambda: merge(model),
        lambda: merge(model, adapters={"b": 1}),
        lambda: set_adapter(model, "b"),
        lambda: add_adapter(model, "c"),
    ):
        with pytest.raises(ValueError, match=r"unmerge\(model\)"):
            call()
    merge(model, adapters=factors)
    unmerge(model)
    assert torch.equal(model(X), before)
    assert all(torch.equal(w, m.weight) for w, m in zip(weights, (model[0], model[2], model[4]), strict=True))
    merge(model, adapters=factors)
    plain = merge_and_unload(model)
    assert list(plain.state_dict()) == list(network().state_dict())
    torch.testing.assert_close(plain(X), expected(X), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("factors", "message"),
    [
        ({}, "adapters names none"),
        ({"nobody": 1.0}, "no adapter 'nobody'; it has default, b"),
        ({"b": float("nan")}, "factor of 'b' must be a finite number"),
        ({"b": True}, "factor of 'b' must be a finite number"),
        ({"b": 1e39}, "is not finite in float32: 2, 4"),
    ],
)
def test_factors_that_cannot_be(factors, message):
    model = two()
    with pytest.raises(ValueError, match=message):
        merge_adapters(model, factors, "both")
    assert adapter_names(model) == ["default", "b"]


def test_unloading_leaves_the_active_one():
    model = two()
    set_adapter(model, "b")
    expected = model(X)
    plain = merge_and_unload(model)
    torch.testing.assert_close(plain(X), expected, rtol=1e-5, atol=1e-5)
    assert [type(m) for m in plain] == [type(m) for m in network()]
    assert list(plain.state_dict()) == list(network().state_dict())
    assert all(p.requires_grad for p in plain.parameters())
    apply_dash(plain, BASE)
    assert adapter_names(plain) == ["default"]


def test_copies_pickles_and_state_dicts():
    model = two()
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert adapter_names(twin) == ["default", "b"]
        for name in ("default", "b"):
            assert torch.equal(alone(twin, name), alone(model, name))
        set_adapter(twin, "b")
        assert active_adapter(model) == "default"
    other = filled(two(), seed=9)
    other.load_state_dict(model.state_dict())
    assert torch.equal(alone(other, "b"), alone(model, "b"))
    set_adapter(other, "b")
    with pytest.raises(ValueError, match="in the state dict the adapter 'b' is not the active one, and here it is"):
        other.load_state_dict(model.state_dict(), strict=False)
    double = copy.deepcopy(model).double()
    assert double[2].part("b", "lora_a").dtype == torch.float64 and double[2].part("b", "launched").dtype == torch.bool


def test_what_is_counted_and_grouped():
    model = two()
    own = sum(p.numel() for p in parameters_of(model, "default"))
    found = summary(model)
    assert (found.layers, found.adapters, found.other_trainable) == (2, own, 0)
    train_adapters(model, ["b"])
    assert summary(model).adapters == own + sum(p.numel() for p in parameters_of(model, "b"))
    groups = {g["name"]: g["params"] for g in dash_parameter_groups(model, lr=0.1)}
    assert groups.keys() == {"adapters", "sigma"} and len(groups["adapters"]) == 8 and len(groups["sigma"]) == 4
    train_adapters(model, [])
    assert summary(model).adapters == own
    loradash.dash_only(model)
    set_adapter(model, "b")
    assert not dash_state(model).dash_only and model[2].lora_a.requires_grad
    set_adapter(model, "default")
    assert dash_state(model).dash_only and not model[2].lora_a.requires_grad


def test_refusals_change_nothing():
    model = two()
    before = repr(model), list(model.state_dict())
    for call, message in (
        (lambda: add_adapter(model, "b", BASE), "has an adapter 'b' already"),
        (lambda: add_adapter(model, "a.b", BASE), "must be a string without dots"),
        (lambda: add_adapter(model, "base", BASE), "not empty nor 'base'"),
        (
            lambda: add_adapter(model, "c", DashConfig(target_modules=["nothing"])),
            "matches none of the 3 linear layers",
        ),
        (lambda: add_adapter(model, "c", DashConfig(train_bias=True)), "adapter 'c' trains parts of the model"),
        (
            lambda: add_adapter(model, "c", DashConfig(overrides={"9": {"r": 1}})),
            "overrides: '9' matches no linear layer",
        ),
        (lambda: set_adapter(model, "c"), "no adapter 'c'; it has default, b"),
        (lambda: delete_adapter(model, "c"), "no adapter 'c'"),
        (lambda: delete_adapter(model, "default"), "'default' is the active one"),
        (lambda: train_adapters(model, ["b", "c"]), "no adapter 'c'"),
        (lambda: add_adapter(network(), "c"), r"call apply_dash\(model, config\) first"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
        assert (repr(model), list(model.state_dict()), adapter_names(model)) == (*before, ["default", "b"])
    assert not any(p.requires_grad for p in parameters_of(model, "b"))
