"""Adapters on disk: round trips, resuming in both phases, files that are damaged or do not fit, merged and sharded models."""

from __future__ import annotations

import loradash
import pytest
import torch
from loradash import AdapterError, DashConfig, DashSchedule, apply_dash, load_adapter, save_adapter
from safetensors.torch import load_file
from support.networks import CONFIG, X, network, train, trained
from torch import nn


@pytest.mark.parametrize("steps", [2, 6])
@pytest.mark.parametrize("adapted", [False, True])
def test_round_trip(tmp_path, steps, adapted):
    model = trained(steps)
    file = save_adapter(model, tmp_path)
    other = apply_dash(network(), CONFIG) if adapted else network()
    load_adapter(other, file)
    assert torch.equal(other(X), model(X))
    assert loradash.dash_state(other).step == steps
    assert loradash.dash_state(other).config == CONFIG
    assert [bool(x.launched) for x in loradash.dash_layers(other).values()] == [steps >= 4] * 2


@pytest.mark.parametrize("cut", [2, 5])
def test_resumed_training_is_the_same_training(tmp_path, cut):
    """Stopped before or after launch and resumed: bit for bit the weights of a run that was not stopped."""
    whole = trained(8)
    resumed = train(load_adapter(network(), save_adapter(trained(cut), tmp_path)), 8 - cut)
    ours, theirs = whole.state_dict(), resumed.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(v, theirs[k]) for k, v in ours.items())


def test_paths(tmp_path):
    model = trained()
    assert save_adapter(model, tmp_path / "deep" / "folder").name == "loradash_adapter.safetensors"
    assert save_adapter(model, tmp_path / "one.safetensors") == tmp_path / "one.safetensors"
    load_adapter(network(), tmp_path / "deep" / "folder")


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (
            lambda: nn.Sequential(nn.Linear(20, 31), nn.Tanh(), nn.Linear(31, 20), nn.Tanh(), nn.Linear(20, 3)),
            "has shape",
        ),
        (lambda: nn.Sequential(nn.Linear(20, 30), nn.Tanh(), nn.Linear(30, 20)), "has no place|does not fit"),
        (
            lambda: nn.Sequential(nn.Linear(20, 30), nn.Tanh(), nn.Linear(30, 20), nn.Linear(20, 9), nn.Linear(9, 3)),
            "missing|shape",
        ),
        (lambda: apply_dash(network(), DashConfig(r=2)), "shape|missing|place"),
    ],
)
def test_other_models(tmp_path, other, message):
    file = save_adapter(trained(), tmp_path)
    model = other()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(AdapterError, match=message):
        load_adapter(model, file)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_trained_biases_travel(tmp_path):
    config = DashConfig(r=2, directions=1, prelaunch_steps=2, train_bias=True)
    model = train(apply_dash(network(), config), 3)
    assert torch.equal(load_adapter(network(), save_adapter(model, tmp_path))(X), model(X))
    with pytest.raises(ValueError, match="train_bias"):
        loradash.export_lora(model, tmp_path)


def test_no_adapters(tmp_path):
    with pytest.raises(ValueError, match="apply_dash"):
        save_adapter(network(), tmp_path)


@pytest.mark.parametrize("adapted", [False, True])
def test_a_model_without_values_is_refused(tmp_path, adapted):
    file = save_adapter(trained(), tmp_path)
    model = network().to("meta")
    if adapted:
        apply_dash(model, CONFIG)
    with pytest.raises(AdapterError, match=r"meta.*0\..*materialise"):
        load_adapter(model, file)
    assert adapted == isinstance(model[0], loradash.DashLinear)


def test_a_whole_module_without_values_is_refused(tmp_path):
    file = save_adapter(trained(), tmp_path)
    model = network()
    model[4].to("meta")
    with pytest.raises(AdapterError, match=r"meta.*4\.weight"):
        load_adapter(model, file)
    assert type(model[0]) is nn.Linear


def test_models_that_cannot_be_copied(tmp_path):
    """A generator, a local hook and a tensor with a history: none of them concerns the adapter."""
    model = network()
    model.generator = torch.Generator()
    model.history = (torch.ones(2, requires_grad=True) * 2,)
    model[1].register_forward_hook(lambda *_: None)
    assert torch.equal(load_adapter(model, save_adapter(trained(), tmp_path))(X), trained()(X))


@pytest.mark.parametrize("kind", ["first", "second"])
def test_a_merged_model_takes_another_adapter(tmp_path, kind):
    model, new = trained(6), trained(8 if kind == "first" else 3)
    file = save_adapter(new, tmp_path)
    loradash.merge(model)
    load_adapter(model, file)
    assert all(layer.merged for layer in loradash.dash_layers(model).values())
    torch.testing.assert_close(model(X), new(X), rtol=1e-5, atol=1e-5)
    loradash.unmerge(model)
    assert torch.equal(model(X), new(X))


def test_a_merge_that_fails_leaves_the_old_adapter_merged(tmp_path, monkeypatch):
    model, file = trained(6), save_adapter(trained(8), tmp_path)
    loradash.merge(model)
    before, outputs, state = {k: v.clone() for k, v in model.state_dict().items()}, model(X), loradash.dash_state(model)
    whole, failures = loradash.DashLinear.merge, ["once"]

    def failing(layer, *arguments):
        if layer is model[2] and failures:
            raise ValueError(f"overflows {failures.pop()}")
        whole(layer, *arguments)

    monkeypatch.setattr(loradash.DashLinear, "merge", failing)
    with pytest.raises(AdapterError, match=r"cannot be merged.*overflows once"):
        load_adapter(model, file)
    assert all(layer.merged for layer in loradash.dash_layers(model).values())
    assert torch.equal(model(X), outputs)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert (state.step, state.config) == (6, CONFIG)


def test_a_merged_model_saves_the_same_file(tmp_path):
    config = DashConfig(r=2, directions=1, prelaunch_steps=2, train_bias=True, trainable_modules=["4"])
    model = train(apply_dash(network(), config), 3)
    plain = load_file(save_adapter(model, tmp_path / "plain"))
    loradash.merge(model)
    merged = load_file(save_adapter(model, tmp_path / "merged"))
    assert plain.keys() == merged.keys() and {"0.bias", "4.weight"} <= plain.keys()
    assert all(torch.equal(t, merged[k]) for k, t in plain.items())


def test_tied_modules_are_saved_and_loaded(tmp_path):
    def tied():
        model = nn.Sequential(nn.Linear(20, 20), nn.Linear(20, 20), nn.Linear(20, 20))
        model[2].weight = model[1].weight
        return model

    model = apply_dash(tied(), DashConfig(r=2, directions=1, trainable_modules=["1", "2"]))
    model[2].weight.data.normal_()
    other = load_adapter(tied(), save_adapter(model, tmp_path))
    assert other[2].weight is other[1].weight
    assert torch.equal(other[1].weight, model[1].weight)


def test_state_that_is_no_tensor_is_named(tmp_path):
    class Odd(nn.Linear):
        def get_extra_state(self):
            return {"a": 1}

        def set_extra_state(self, state):
            pass

    model = apply_dash(nn.Sequential(nn.Linear(4, 4), Odd(4, 4)), DashConfig(r=2, trainable_modules=["1"]))
    with pytest.raises(ValueError, match=r"1\._extra_state is a dict"):
        save_adapter(model, tmp_path)


def test_names_do_not_depend_on_wrappers(tmp_path):
    """Blocks that were compiled or checkpointed after apply_dash: the file fits a plain model, and the other way round."""
    wrapper = pytest.importorskip("torch.distributed.algorithms._checkpoint.checkpoint_wrapper").checkpoint_wrapper

    def wrapped(model):
        model[0], model[4] = torch.compile(model[0], backend="eager"), torch.compile(model[4], backend="eager")
        model[2] = wrapper(model[2])
        return model

    plain = trained()
    file = save_adapter(wrapped(trained()), tmp_path / "wrapped")
    assert load_file(file).keys() == load_file(save_adapter(plain, tmp_path / "plain")).keys()
    assert torch.equal(load_adapter(network(), file)(X), plain(X))
    other = wrapped(trained(2))
    load_adapter(other, file)
    assert torch.equal(other[0].lora_b, plain[0].lora_b) and torch.equal(other[4].weight, plain[4].weight)
    assert other[2].config.r == 5


def test_parameters_in_pieces_are_not_saved(tmp_path):
    model = trained()
    # FSDP1 leaves such pieces between two forward passes.
    model[0].lora_a = nn.Parameter(model[0].lora_a.detach().flatten()[:7])
    with pytest.raises(ValueError, match=r"0\.lora_a has shape \(7,\), wanted \(3, 20\).*GatheredParameters"):
        save_adapter(model, tmp_path)
    assert not list(tmp_path.iterdir())


def trains(model):
    return {name for name, p in model.named_parameters() if p.requires_grad}


def test_dash_only_travels(tmp_path):
    model = trained()
    loradash.dash_only(model)
    file = save_adapter(model, tmp_path / "only")
    assert trains(model) == {"0.dash_sigma", "2.dash_sigma", "4.weight", "4.bias"}
    for other in (network(), trained(2)):
        load_adapter(other, file)
        assert trains(other) == trains(model) and loradash.dash_state(other).dash_only
    everything = trained()
    load_adapter(model, save_adapter(everything, tmp_path / "all"))
    assert trains(model) == trains(everything) and not loradash.dash_state(model).dash_only


def test_loading_thaws_nothing_that_the_user_froze(tmp_path):
    model = trained().requires_grad_(False)
    load_adapter(model, save_adapter(trained(3), tmp_path))
    assert not trains(model)


def test_a_schedule_made_before_loading_counts_on(tmp_path):
    model = apply_dash(network(), CONFIG)
    schedule, state = DashSchedule(model, progress=False), loradash.dash_state(model)
    load_adapter(model, save_adapter(trained(2), tmp_path))
    schedule.step()
    assert loradash.dash_state(model) is state and state.step == 3
