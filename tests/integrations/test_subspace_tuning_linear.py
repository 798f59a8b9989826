"""`Linear`, the drop-in for loralib's: phases, state dicts, eval and train, shapes, and the rest of loradash around it."""

from __future__ import annotations

import copy
import pickle

import loradash
import pytest
import torch
from loradash import DashSchedule, dash_layers, load_adapter, save_adapter
from loradash.integrations.subspace_tuning import Linear, lora_state_dict, mark_only_lora_as_trainable, patch
from safetensors.torch import load_file
from support.authors import CLASSES, WIDTH, batches, losses_of, make_model
from torch import nn
from torch.distributed.fsdp import fully_shard

both_semantics = pytest.mark.parametrize("semantics", ["authors", "loradash"])


def schedule_for(model, semantics):
    return DashSchedule(model, progress=False) if semantics == "loradash" else None


def drop_in(semantics="loradash", **settings):
    """The counterpart of `make_model`, of our own class; warm-up of 10."""
    torch.manual_seed(0)
    make = {"r": 4, "lora_alpha": 8, "semantics": semantics, **settings}
    model = nn.Sequential(Linear(WIDTH, 32, **make), nn.Tanh(), Linear(32, CLASSES, **make))
    for layer in (model[0], model[2]):
        layer.warmup = 10
    mark_only_lora_as_trainable(model)
    return model


def test_the_drop_in_is_theirs_from_the_start():
    """Same seed, same initial values, same names in the state dict but for the key of the phase."""
    theirs = make_model("loralib", "restated", warmup=10)
    ours = drop_in("authors")
    ours.load_state_dict(theirs.state_dict())
    assert ours.state_dict().keys() - theirs.state_dict().keys() == {"0.lora_flag", "2.lora_flag"}
    assert (losses_of(ours, 30) - losses_of(theirs, 30)).abs().max() < 1e-6
    assert isinstance(ours[0], nn.Linear) and isinstance(ours[0], Linear)


def test_rank_zero_is_a_plain_layer():
    layer = Linear(6, 5)
    assert [name for name, _ in layer.named_parameters()] == ["weight", "bias"]
    x = torch.randn(3, 6)
    assert torch.equal(layer(x), nn.functional.linear(x, layer.weight, layer.bias))
    assert not dash_layers(nn.Sequential(layer))
    turned = Linear(6, 5, fan_in_fan_out=True)
    assert turned.weight.shape == (6, 5)
    assert torch.equal(turned(x), nn.functional.linear(x, turned.weight.T, turned.bias))


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"r": -1}, "^r must"),
        ({"r": True}, "^r must"),
        ({"r": 2, "semantics": "ours"}, "^semantics must"),
        ({"r": 2, "lora_dropout": -0.1}, "^lora_dropout must"),
        ({"r": 2, "lora_alpha": "8"}, "^lora_alpha must"),
        ({"r": 2, "lora_alpha": float("nan")}, "^lora_alpha must"),
    ],
)
def test_wrong_arguments_are_named(arguments, named):
    with pytest.raises(ValueError, match=named):
        Linear(6, 5, **arguments)


@pytest.mark.parametrize("moment", [5, 10, 15])
@both_semantics
def test_resuming_from_a_state_dict(moment, semantics):
    """Before launch, at it and after it: the state dict carries count and phase, which theirs does not."""
    whole = drop_in(semantics)
    losses = losses_of(whole, 20, schedule=schedule_for(whole, semantics))
    first = drop_in(semantics)
    losses_of(first, moment, schedule=schedule_for(first, semantics))
    second = drop_in(semantics)
    second.load_state_dict(first.state_dict())
    later = schedule_for(second, semantics)
    assert torch.equal(losses_of(second, 20 - moment, schedule=later, skip=moment), losses[moment:])
    assert all(torch.equal(t, whole.state_dict()[key]) for key, t in second.state_dict().items())


@pytest.mark.parametrize("moment", [5, 15])
@both_semantics
def test_resuming_from_an_adapter_file(moment, semantics, tmp_path):
    whole = drop_in(semantics)
    losses = losses_of(whole, 20, schedule=schedule_for(whole, semantics))
    first = drop_in(semantics)
    losses_of(first, moment, schedule=schedule_for(first, semantics))
    save_adapter(first, tmp_path)
    second = drop_in(semantics)
    load_adapter(second, tmp_path)
    assert loradash.dash_state(second).step == (moment if semantics == "loradash" or moment < 10 else 11)
    found = losses_of(second, 20 - moment, schedule=schedule_for(second, semantics), skip=moment)
    assert torch.equal(found, losses[moment:])
    # The same file serves plain layers: nothing about it is the drop-in's.
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(WIDTH, 32), nn.Tanh(), nn.Linear(32, CLASSES))
    plain.load_state_dict({key: t for key, t in first.state_dict().items() if key in plain.state_dict()})
    load_adapter(plain, tmp_path)
    x, _ = next(batches(1))
    torch.testing.assert_close(plain(x), first.eval()(x), rtol=1e-5, atol=1e-6)


def test_directions_lost_by_their_state_dict_come_back():
    theirs = make_model("loralib", "restated", warmup=10)
    losses_of(theirs, 20)
    state = theirs.state_dict()
    kept = {key: t for key, t in state.items() if "lora_" in key}
    ours = drop_in()
    ours.load_state_dict(
        {key: t for key, t in state.items() if key.rpartition(".")[2] in ("weight", "bias")}, strict=False
    )
    result = ours.load_state_dict(kept, strict=False)
    assert not result.unexpected_keys and bool(ours[0].launched)
    x, _ = next(batches(1))
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-6)
    with pytest.raises(RuntimeError, match="lora_change_a are not the singular values of this weight"):
        drop_in().load_state_dict({key: t + t for key, t in kept.items()}, strict=False)
    for key in [key for key in kept if "change" in key]:
        del kept[key]
    with pytest.raises(
        RuntimeError, match="0: weight_u_top and weight_vt_top are missing in the state dict of a launched layer"
    ):
        drop_in().load_state_dict(kept, strict=False)


def test_our_lora_state_dict_keeps_the_directions():
    model = drop_in("authors")
    losses_of(model, 15)
    state = lora_state_dict(model)
    assert {key.rpartition(".")[2] for key in state} == {
        *("lora_A", "lora_B", "lora_index", "lora_flag", "weight_u_top", "weight_vt_top")
    }
    assert (
        set(lora_state_dict(model, "lora_only")) == set(lora_state_dict(model, "all")) == {*state, "0.bias", "2.bias"}
    )
    other = drop_in("authors")
    other.load_state_dict(model.state_dict() | state)
    assert bool(other[0].launched) and other[0].FLAG == 11
    with pytest.raises(ValueError, match="no Linear of this package"):
        mark_only_lora_as_trainable(nn.Sequential(nn.Linear(3, 3), Linear(3, 3)))
    for call in (lora_state_dict, mark_only_lora_as_trainable):
        with pytest.raises(ValueError, match="bias must be one of"):
            call(model, "some")


def test_merge_weights_follows_eval_and_train():
    model = drop_in()
    losses_of(model, 15, schedule=schedule_for(model, "loradash"))
    x, _ = next(batches(1))
    y, weight, state = model(x), model[0].weight, {key: t.clone() for key, t in model.state_dict().items()}
    model.eval()
    assert model[0].merged and model[0].weight is not weight
    torch.testing.assert_close(model(x), y, rtol=1e-5, atol=1e-6)
    assert all(torch.equal(t, state[key]) for key, t in model.state_dict().items()), "a file does not know of eval"
    model.load_state_dict(state)
    torch.testing.assert_close(model(x), y, rtol=1e-5, atol=1e-6)
    model.train()
    assert model[0].weight is weight and torch.equal(model(x), y)
    kept = drop_in(merge_weights=False).eval()
    assert not kept[0].merged
    assert not drop_in("authors").eval()[0].merged, "their file has no code for it"


@pytest.mark.parametrize("fan_in_fan_out", [False, True])
@both_semantics
def test_fan_in_fan_out_is_only_a_way_of_storing(fan_in_fan_out, semantics):
    """Square weights, where theirs takes the directions of the transpose without a word."""
    make = {"r": 4, "lora_alpha": 8, "semantics": semantics}
    models = []
    for flag in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(Linear(WIDTH, WIDTH, **make, fan_in_fan_out=flag), nn.Linear(WIDTH, CLASSES))
        model[0].warmup = 10
        mark_only_lora_as_trainable(model)
        models.append(model)
    assert torch.equal(models[1][0].weight, models[0][0].weight.T)
    losses = [losses_of(m, 20, schedule=schedule_for(m, semantics)) for m in models]
    assert (losses[0] - losses[1]).abs().max() < 1e-6
    pairs = (models[0][0].weight_u_top.t() @ models[1][0].weight_u_top).abs()
    assert torch.allclose(pairs, torch.eye(8), atol=1e-4)


@both_semantics
def test_small_layers_have_as_many_directions_as_their_weight(semantics):
    """Theirs raise at launch where min(N, K) < 8. Parameters keep the width of theirs, for state dicts."""
    torch.manual_seed(0)
    model = nn.Sequential(Linear(WIDTH, 5, r=2, semantics=semantics), nn.Linear(5, CLASSES))
    model[0].warmup = 10
    mark_only_lora_as_trainable(model)
    losses_of(model, 20, "adamw", schedule_for(model, semantics))
    layer = model[0]
    assert layer.lora_index.shape == (8,) and layer.dash_sigma.shape == (5,) and bool(layer.launched)
    assert layer.lora_index[:5].all() and not layer.lora_index[5:].any()
    assert torch.allclose(layer.dash_u.t() @ layer.dash_u, torch.eye(5), atol=1e-4)


def test_a_schedule_of_a_model_that_was_not_marked_says_so():
    with pytest.raises(ValueError, match=r"adapted one by one.*mark_only_lora_as_trainable\(model\) first"):
        DashSchedule(nn.Sequential(Linear(4, 4, r=2)))


def test_a_run_without_a_schedule_is_told():
    model = drop_in()
    x, _ = next(batches(1))
    with pytest.warns(UserWarning, match="0 trains as plain LoRA, since no DashSchedule"):
        model(x)
    model.eval()
    with torch.no_grad():
        model(x)


def sharded(mesh, model, *parts):
    for part in (*parts, model):
        fully_shard(part, mesh=mesh)
    return model


def test_a_sharded_model_trains_as_a_whole_one(process_group):
    whole, parts = drop_in(merge_weights=False), drop_in(merge_weights=False)
    sharded(process_group, parts, parts[0], parts[2])
    losses = [losses_of(model, 15, schedule=schedule_for(model, "loradash")) for model in (whole, parts)]
    assert torch.equal(*losses) and bool(parts[0].launched) and parts[0].lora_index.full_tensor().any()


def test_a_sharded_model_that_launches_in_forward_is_refused(process_group):
    """What forward writes into parameters is lost after it: the dash term would be zero from launch on, without a word."""
    model = drop_in("authors")
    with pytest.raises(ValueError, match=r"the model is sharded \(fully_shard\).*semantics='loradash'"):
        losses_of(sharded(process_group, model, model[0], model[2]), 2)
    # Here the model that was marked has no part that is sharded by itself.
    outer = nn.Sequential(drop_in("authors"))
    with pytest.raises(RuntimeError, match="0: the directions that its launch wrote are gone"):
        losses_of(sharded(process_group, outer), 15)
    forks = make_model("sdg", "restated")
    patch(forks)
    with pytest.raises(ValueError, match=r"0 is sharded \(DTensor\), and its delta sigma is not kept"):
        DashSchedule(sharded(process_group, forks))


def test_the_authors_semantics_refuses_a_schedule_and_prelaunch():
    model = drop_in("authors")
    with pytest.raises(ValueError, match="DashSchedule is for semantics='loradash'"):
        DashSchedule(model)
    losses_of(model, 2)
    with pytest.raises(ValueError, match="launches itself"):
        loradash.prelaunch(model, progress=False)
    assert not any(bool(layer.launched) for layer in dash_layers(model).values())


@both_semantics
def test_copies_and_pickles_are_whole(semantics):
    model = drop_in(semantics)
    schedule = schedule_for(model, semantics)
    losses_of(model, 12, schedule=schedule)
    x, _ = next(batches(1))
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(x), model(x)) and other[0].FLAG == model[0].FLAG
        other[0].lora_index.data.fill_(1)
        assert not torch.equal(other(x), model(x)), "the copy has parameters of its own"


def test_scaling_and_dropout_of_a_layer_are_live():
    model = drop_in(lora_dropout=0.5, merge_weights=False)
    losses_of(model, 12, schedule=schedule_for(model, "loradash"))
    x, _ = next(batches(1))
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    dropped = model(x)
    assert torch.equal(dropped, model.eval()(x))
    model[0].scaling = 0.0001
    assert model[0].scaling == pytest.approx(0.0001) and not torch.equal(model(x), dropped)


def test_export_folds_the_drop_in(tmp_path):
    model = drop_in()
    losses_of(model, 15, schedule=schedule_for(model, "loradash"))
    loradash.export_lora(model, tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    x, _ = next(batches(1))
    plain = nn.functional.linear(x, model[0].weight, model[0].bias)
    a, b = (tensors[f"base_model.model.0.lora_{part}.weight"] for part in "AB")
    torch.testing.assert_close(plain + x @ a.t() @ b.t(), model[0](x), rtol=1e-5, atol=1e-5)


@both_semantics
def test_reset_parameters_begins_anew(semantics):
    """As for a model that was built on meta and materialised: every value is its own again, the phase too."""
    model = drop_in(semantics)
    losses_of(model, 15, schedule=schedule_for(model, semantics))
    model[0].to_empty(device="cpu").reset_parameters()
    layer = model[0]
    assert not bool(layer.launched) and layer.FLAG == 0 and layer.lora_A.any() and not layer.lora_B.any()
    assert not any(getattr(layer, part).any() for part in ("lora_index", "weight_u_top", "weight_vt_top"))
    with torch.device("meta"):
        empty = Linear(8, 8, r=2, semantics=semantics)
    assert empty.lora_A.is_meta and "on meta" not in repr(empty)


@both_semantics
def test_a_head_that_trains_is_kept_whenever_that_was_said(semantics, tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(Linear(WIDTH, 32, r=2, semantics=semantics), nn.Linear(32, CLASSES))
    mark_only_lora_as_trainable(model)
    model[1].requires_grad_(True)
    losses_of(model, 2, schedule=schedule_for(model, semantics))
    save_adapter(model, tmp_path)
    plain = nn.Sequential(nn.Linear(WIDTH, 32), nn.Linear(32, CLASSES))
    load_adapter(plain, tmp_path)
    assert torch.equal(plain[1].weight, model[1].weight)
    other = nn.Sequential(Linear(WIDTH, 32, r=2, semantics=semantics), nn.Linear(32, CLASSES))
    other[0].warmup = 7
    mark_only_lora_as_trainable(other)
    other[1].requires_grad_(True)
    schedule_for(other, semantics)
    load_adapter(other, tmp_path)
    assert torch.equal(other[1].weight, model[1].weight)
    assert other[0].warmup == 100 and loradash.dash_state(other).config.prelaunch_steps == 100


def test_all_biases_may_train_and_the_file_s_limit_is_told():
    torch.manual_seed(0)
    model = nn.Sequential(Linear(WIDTH, CLASSES, r=2), nn.LayerNorm(CLASSES))
    with pytest.warns(UserWarning, match=r"1.bias trains and 1.weight does not"):
        mark_only_lora_as_trainable(model, "all")
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        *("0.bias", "0.lora_A", "0.lora_B", "0.lora_index", "1.bias")
    }
    state = loradash.dash_state(model)
    assert state.config.train_bias
    mark_only_lora_as_trainable(model)
    assert loradash.dash_state(model) is state and not state.config.train_bias
    mark_only_lora_as_trainable(model, "lora_only")
    assert state.config.train_bias and model[0].bias.requires_grad and not model[1].bias.requires_grad
