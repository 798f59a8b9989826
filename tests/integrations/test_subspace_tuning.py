"""Layers on our operator beside the authors': one seed, 300 steps, through launch; phases, masks, counts, state dicts."""

from __future__ import annotations

import copy
import pickle

import loradash
import pytest
import torch
from loradash import DashSchedule, dash_layers, load_adapter, save_adapter
from loradash.integrations import subspace_tuning
from loradash.integrations.subspace_tuning import Linear, lora_state_dict, mark_only_lora_as_trainable, patch, unpatch
from support.authors import DIALECTS, SOURCES, make_layer, make_model
from torch import nn
from torch.utils.checkpoint import checkpoint

WIDTH, CLASSES = 24, 16
OPTIMIZERS = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, 0.3),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, 3e-3),
}
both_semantics = pytest.mark.parametrize("semantics", ["authors", "loradash"])


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def batches(steps, seed=1):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        x = torch.randn(16, WIDTH, generator=generator)
        yield x, x[:, :CLASSES] + 0.1 * torch.randn(16, CLASSES, generator=generator)


def trained(model, steps, optimizer="sgd", schedule=None, skip=0):
    """The losses of some steps of one stream of batches, from step `skip` on."""
    if not isinstance(optimizer, torch.optim.Optimizer):
        optimizer = OPTIMIZERS[optimizer]([p for p in model.parameters() if p.requires_grad])
    losses = []
    for x, target in list(batches(skip + steps))[skip:]:
        optimizer.zero_grad()
        loss = (model(x) - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if schedule is not None:
            schedule.step()
    return torch.tensor(losses, dtype=torch.float64)


def schedule_for(model, semantics):
    return DashSchedule(model, progress=False) if semantics == "loradash" else None


def gaps(ours, theirs):
    """The largest differences of parameters, relative to the largest number of each."""
    own = dict(theirs.named_parameters())
    return {
        name: float((parameter - own[name]).detach().abs().max() / own[name].detach().abs().max().clamp_min(1e-3))
        for name, parameter in ours.named_parameters()
        if name.rpartition(".")[2] not in ("lora_change_a", "lora_change_bb")
    }


def drop_in(semantics="loradash", **settings):
    """The counterpart of `make_model`, of our own class; warm-up of 10."""
    torch.manual_seed(0)
    make = {"r": 4, "lora_alpha": 8, "semantics": semantics, **settings}
    model = nn.Sequential(Linear(WIDTH, 32, **make), nn.Tanh(), Linear(32, CLASSES, **make))
    for layer in (model[0], model[2]):
        layer.warmup = 10
    mark_only_lora_as_trainable(model)
    return model


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@both_semantics
def test_300_steps_are_those_of_the_authors(source, optimizer, semantics):
    """Without dropout our rules give the same numbers too, since a step is a forward call."""
    theirs = make_model("loralib", source)
    ours = copy.deepcopy(theirs)
    patch(ours, semantics)
    wanted = trained(theirs, 300, optimizer)
    found = trained(ours, 300, optimizer, schedule_for(ours, semantics))
    assert wanted[-1] < 0.9 * wanted[99], "the directions learn"
    assert (found - wanted).abs().max() < 2e-6
    # The pairs (u, v) may come with both signs changed.
    assert max(gap for name, gap in gaps(ours, theirs).items() if "weight_" not in name) < 2e-4
    for mine, other in ((ours[0], theirs[0]), (ours[2], theirs[2])):
        assert mine.FLAG == other.FLAG == 101 and bool(mine.launched)
        pairs = (mine.weight_u_top.t() @ other.weight_u_top).abs()
        assert torch.allclose(pairs, torch.eye(8), atol=1e-4), "the same directions in the same order"


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("dialect", DIALECTS)
@both_semantics
def test_every_dialect_goes_through_launch_as_theirs(dialect, source, semantics):
    theirs = make_model(dialect, source, warmup=12)
    ours = copy.deepcopy(theirs)
    report = patch(ours, semantics)
    assert report.patched == {"0": dialect, "2": dialect} and not report.left
    wanted = trained(theirs, 24, "adamw")
    found = trained(ours, 24, "adamw", schedule_for(ours, semantics))
    assert (found - wanted).abs().max() < 1e-6
    # Adam's first step on a coordinate divides a gradient by its size, whose smallest ones are rounding.
    assert max(gap for name, gap in gaps(ours, theirs).items() if "_u" not in name and "_vt" not in name) < 5e-3


def test_the_drop_in_is_theirs_from_the_start():
    """Same seed, same initial values, same names in the state dict but for the key of the phase."""
    theirs = make_model("loralib", "restated", warmup=10)
    ours = drop_in("authors")
    ours.load_state_dict(theirs.state_dict())
    assert ours.state_dict().keys() - theirs.state_dict().keys() == {"0.lora_flag", "2.lora_flag"}
    assert (trained(ours, 30) - trained(theirs, 30)).abs().max() < 1e-6
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
    [({"r": -1}, "r must"), ({"r": True}, "r must"), ({"r": 2, "semantics": "ours"}, "semantics must")],
)
def test_wrong_arguments_are_named(arguments, named):
    with pytest.raises(ValueError, match=named):
        Linear(6, 5, **arguments)


@both_semantics
def test_one_mask_or_two(semantics):
    """A layer whose LoRA term is the dropped x, and its dash term a thousand times the dropped x: what was dropped shows."""
    torch.manual_seed(0)
    layer = Linear(8, 8, r=8, lora_alpha=8, lora_dropout=0.5, bias=False, semantics=semantics)
    with torch.no_grad():
        layer.weight.zero_()
        for part in (layer.lora_A, layer.lora_B, layer.weight_u_top, layer.weight_vt_top):
            part.copy_(torch.eye(8))
        layer.lora_index.fill_(1000)
        layer.note_phase(True, 0)
    y = layer(torch.ones(64, 8))
    lora, dash = y % 1000, y // 1000
    kept = [float((term == 2).float().mean()) for term in (lora, dash)]
    assert set(lora.unique().tolist()) == set(dash.unique().tolist()) == {0.0, 2.0}
    assert all(0.4 < share < 0.6 for share in kept)
    assert torch.equal(lora, dash) == (semantics == "loradash")
    if semantics == "authors":
        assert 0.4 < float((lora == dash).float().mean()) < 0.6, "two independent draws"
    layer.eval()
    assert torch.allclose(layer(torch.ones(2, 8)), torch.full((2, 8), 1001.0))


def test_gradients_under_two_masks():
    """Against autograd through the two terms apart, with the masks that were drawn."""
    torch.manual_seed(0)
    layer = Linear(6, 5, r=2, lora_alpha=4, lora_dropout=0.25, semantics="authors").double()
    with torch.no_grad():
        layer.lora_B.normal_()
        layer.lora_index.normal_()
        layer.weight_u_top.normal_()
        layer.weight_vt_top.normal_()
        layer.note_phase(True, 0)
    x = torch.randn(3, 6, dtype=torch.double, requires_grad=True)

    def with_seed(*values):
        torch.manual_seed(3)
        leaves = dict(zip(("lora_A", "lora_B", "lora_index"), values[1:], strict=True))
        return torch.func.functional_call(layer, leaves, (values[0],))

    leaves = (x, layer.lora_A, layer.lora_B, layer.lora_index)
    assert torch.autograd.gradcheck(with_seed, leaves)


def test_calls_count_as_theirs_and_recomputation_does_not():
    theirs = make_layer("loralib", "restated", WIDTH, CLASSES, warmup=4)
    ours = copy.deepcopy(nn.Sequential(theirs))
    patch(ours, "authors")
    x = torch.randn(4, WIDTH)
    for call in range(3):
        theirs.train(call != 1), ours.train(call != 1)
        theirs(x), ours(x)
    assert ours[0].FLAG == theirs.FLAG == 3
    for reentrant in (True, False):
        twice = copy.deepcopy(ours)
        for _ in range(4):
            checkpoint(twice, x.clone().requires_grad_(), use_reentrant=reentrant).square().mean().backward()
            if twice[0].FLAG < 5:
                assert not bool(twice[0].launched)
        assert twice[0].FLAG == 5 and bool(twice[0].launched)
        assert twice[0].lora_index.grad.any() or not twice[0].lora_B.any()


@pytest.mark.parametrize("moment", [5, 10, 15])
@both_semantics
def test_resuming_from_a_state_dict(moment, semantics):
    """Before launch, at it and after it: the state dict carries count and phase, which theirs does not."""
    whole = drop_in(semantics)
    losses = trained(whole, 20, schedule=schedule_for(whole, semantics))
    first = drop_in(semantics)
    schedule = schedule_for(first, semantics)
    trained(first, moment, schedule=schedule)
    second = drop_in(semantics)
    second.load_state_dict(first.state_dict())
    later = schedule_for(second, semantics)
    if later is not None:
        later.state.step = schedule.state.step
    assert torch.equal(trained(second, 20 - moment, schedule=later, skip=moment), losses[moment:])
    assert all(torch.equal(t, whole.state_dict()[key]) for key, t in second.state_dict().items())


@pytest.mark.parametrize("moment", [5, 15])
@both_semantics
def test_resuming_from_an_adapter_file(moment, semantics, tmp_path):
    whole = drop_in(semantics)
    losses = trained(whole, 20, schedule=schedule_for(whole, semantics))
    first = drop_in(semantics)
    trained(first, moment, schedule=schedule_for(first, semantics))
    save_adapter(first, tmp_path)
    second = drop_in(semantics)
    load_adapter(second, tmp_path)
    assert loradash.dash_state(second).step == (moment if semantics == "loradash" or moment < 10 else 11)
    found = trained(second, 20 - moment, schedule=schedule_for(second, semantics), skip=moment)
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
    trained(theirs, 20)
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
    with pytest.raises(RuntimeError, match="0: the state dict is of a launched layer and has no weight_u_top"):
        drop_in().load_state_dict(kept, strict=False)


def test_our_lora_state_dict_keeps_the_directions():
    model = drop_in("authors")
    trained(model, 15)
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
    for call in (lora_state_dict, mark_only_lora_as_trainable):
        with pytest.raises(ValueError, match="bias must be one of"):
            call(model, "some")


def test_merge_weights_follows_eval_and_train():
    model = drop_in()
    trained(model, 15, schedule=schedule_for(model, "loradash"))
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


@pytest.mark.parametrize("merge_weights", [True, False])
def test_cr_mr_merges_in_eval_as_theirs_and_comes_back(merge_weights):
    theirs = make_model("cr_mr", "restated", warmup=5)
    for layer in (theirs[0], theirs[2]):
        layer.merge_weights = merge_weights
    trained(theirs, 10)
    ours = copy.deepcopy(theirs)
    patch(ours, "authors")
    x, _ = next(batches(1))
    y = ours(x)
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x), rtol=1e-5, atol=1e-6)
    assert ours[0].merged == theirs[0].merged == merge_weights
    assert torch.equal(ours.train()(x), y)
    ours[0].disable_adapters = True
    assert torch.equal(ours[0](x), nn.functional.linear(x, ours[0].weight, ours[0].bias))


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
    losses = [trained(m, 20, schedule=schedule_for(m, semantics)) for m in models]
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
    trained(model, 20, "adamw", schedule_for(model, semantics))
    layer = model[0]
    assert layer.lora_index.shape == (8,) and layer.dash_sigma.shape == (5,) and bool(layer.launched)
    assert layer.lora_index[:5].all() and not layer.lora_index[5:].any()
    assert torch.allclose(layer.dash_u.t() @ layer.dash_u, torch.eye(5), atol=1e-4)


@pytest.mark.parametrize("dialect", DIALECTS)
def test_adam_on_sigma_begins_at_launch(dialect):
    """In theirs there is no gradient before it; a zero one would spend the bias correction."""
    model = make_model(dialect, "restated", warmup=8)
    patch(model)
    schedule = schedule_for(model, "loradash")
    optimizer = OPTIMIZERS["adamw"]([p for p in model.parameters() if p.requires_grad])
    trained(model, 8, optimizer, schedule)
    sigmas = [layer.stored("dash_sigma") for layer in dash_layers(model).values()]
    assert schedule.launched and not any(optimizer.state[sigma] for sigma in sigmas)
    trained(model, 3, optimizer, schedule, skip=8)
    assert all(optimizer.state[sigma]["step"] == 3 and sigma.any() for sigma in sigmas)


@pytest.mark.parametrize("dialect", DIALECTS)
@both_semantics
def test_bfloat16_launches(dialect, semantics):
    model = make_model(dialect, "restated", warmup=5).bfloat16()
    patch(model, semantics)
    schedule = schedule_for(model, semantics)
    optimizer = OPTIMIZERS["adamw"]([p for p in model.parameters() if p.requires_grad])
    for x, target in batches(8):
        optimizer.zero_grad()
        (model(x.bfloat16()) - target).square().mean().backward()
        optimizer.step()
        if schedule is not None:
            schedule.step()
    for layer in dash_layers(model).values():
        assert bool(layer.launched) and layer.dash_sigma.any() and layer.dash_u.dtype == torch.bfloat16
        assert torch.allclose(layer.dash_u.float().t() @ layer.dash_u.float(), torch.eye(8), atol=0.05)


def test_a_run_without_a_schedule_is_told():
    model = drop_in()
    x, _ = next(batches(1))
    with pytest.warns(UserWarning, match="0 trains as plain LoRA, since no DashSchedule"):
        model(x)
    model.eval()
    with torch.no_grad():
        model(x)


def test_the_authors_semantics_refuses_a_schedule_and_prelaunch():
    model = drop_in("authors")
    with pytest.raises(ValueError, match="DashSchedule is for semantics='loradash'"):
        DashSchedule(model)
    trained(model, 2)
    with pytest.raises(ValueError, match="launches itself"):
        loradash.prelaunch(model, progress=False)
    assert not any(bool(layer.launched) for layer in dash_layers(model).values())


@both_semantics
def test_copies_and_pickles_are_whole(semantics):
    model = drop_in(semantics)
    schedule = schedule_for(model, semantics)
    trained(model, 12, schedule=schedule)
    x, _ = next(batches(1))
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(x), model(x)) and other[0].FLAG == model[0].FLAG
        other[0].lora_index.data.fill_(1)
        assert not torch.equal(other(x), model(x)), "the copy has parameters of its own"


def test_scaling_and_dropout_of_a_layer_are_live():
    model = drop_in(lora_dropout=0.5, merge_weights=False)
    trained(model, 12, schedule=schedule_for(model, "loradash"))
    x, _ = next(batches(1))
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    dropped = model(x)
    assert torch.equal(dropped, model.eval()(x))
    model[0].scaling = 0.0001
    assert model[0].scaling == pytest.approx(0.0001) and not torch.equal(model(x), dropped)


def test_export_serves_the_drop_in(tmp_path):
    peft = pytest.importorskip("peft")
    model = drop_in()
    trained(model, 15, schedule=schedule_for(model, "loradash"))
    loradash.export_lora(model, tmp_path)
    plain = nn.Sequential(nn.Linear(WIDTH, 32), nn.Tanh(), nn.Linear(32, CLASSES))
    plain.load_state_dict({key: t for key, t in model.state_dict().items() if key in plain.state_dict()})
    x, _ = next(batches(1))
    torch.testing.assert_close(peft.PeftModel.from_pretrained(plain, tmp_path)(x), model(x), rtol=1e-5, atol=1e-5)


def test_the_package_offers_what_its_page_names():
    assert {"Linear", "patch", "unpatch", "convert"} <= set(subspace_tuning.__all__)
    assert unpatch is subspace_tuning.unpatch
