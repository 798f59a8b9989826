"""`patch`: models of the authors' classes on our operator, before and after launch, and back; what is left alone and why."""

from __future__ import annotations

import copy

import loradash
import pytest
import torch
from loradash import DashSchedule, apply_dash, dash_layers, dash_state, load_adapter, save_adapter
from loradash.integrations.subspace_tuning import Linear, patch, unpatch
from support.authors import DIALECTS, SOURCES, make_layer, make_model, trained
from torch import nn

X = torch.randn(6, 24, generator=torch.Generator().manual_seed(0))
both_semantics = pytest.mark.parametrize("semantics", ["authors", "loradash"])


def adapted_of(model, name):
    return dash_layers(model)[name]


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("steps", [0, 3, 9])
@both_semantics
def test_patched_and_unpatched_at_any_time(dialect, source, steps, semantics):
    """Same outputs, same parameters, same classes afterwards; training goes on as if nothing had been."""
    theirs = trained(make_model(dialect, source, warmup=6), steps)
    ours = copy.deepcopy(theirs)
    classes, before = [type(m) for m in ours.modules()], dict(ours.named_parameters())
    attributes = [set(vars(m)) for m in ours.modules()]
    flags = [layer.FLAG for layer in (ours[0], ours[2])]
    report = patch(ours, semantics)
    assert list(report.patched) == ["0", "2"] and "2 layers patched" in str(report)
    assert all(isinstance(m, cls) for m, cls in zip(ours.modules(), classes, strict=True))
    after = dict(ours.named_parameters())
    assert after.keys() == before.keys() and all(after[name] is before[name] for name in before)
    assert [bool(layer.launched) for layer in dash_layers(ours).values()] == [steps > 6] * 2
    with torch.no_grad():
        torch.testing.assert_close(ours.eval()(X), copy.deepcopy(theirs).eval()(X), rtol=1e-5, atol=1e-6)
    ours.train()
    unpatch(ours)
    assert [type(m) for m in ours.modules()] == classes
    assert [set(vars(m)) for m in ours.modules()] == attributes
    # The call above counted in the authors' semantics, but for CR_MR, which is merged in eval.
    counted = int(semantics == "authors" and dialect != "cr_mr" and steps < 6)
    assert [layer.FLAG for layer in (ours[0], ours[2])] == [flag + counted for flag in flags]
    for layer, flag in zip((ours[0], ours[2]), flags, strict=True):
        layer.FLAG = flag
    trained(ours, 6, seed=2), trained(theirs, 6, seed=2)
    own = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        if parameter.requires_grad and name in own and "change" not in name:
            torch.testing.assert_close(parameter, own[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dialect", DIALECTS)
@both_semantics
def test_unpatched_after_launch_theirs_goes_on(dialect, semantics):
    theirs = trained(make_model(dialect, "restated", warmup=6), 12)
    ours = make_model(dialect, "restated", warmup=6)
    trained(ours, 3)
    patch(ours, semantics)
    schedule = DashSchedule(ours, progress=False) if semantics == "loradash" else None
    assert schedule is None or schedule.state.step == 3
    trained(ours, 6, schedule, skip=3)
    unpatch(ours)
    assert ours[0].FLAG == 7
    # The schedule is still there, and watches all optimizers.
    trained(ours, 3, skip=9)
    assert schedule is None or not schedule.step()
    torch.testing.assert_close(ours(X), theirs(X), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dialect", DIALECTS)
def test_everything_of_loradash_works_on_a_patched_model(dialect, tmp_path):
    model = make_model(dialect, "restated", warmup=6)
    report = patch(model)
    assert report.patched == {"0": dialect, "2": dialect}
    schedule = DashSchedule(model, progress=False)
    trained(model, 10, schedule)
    assert schedule.launched and {r.name for r in schedule.reports} == {"0", "2"}
    y = model(X)
    loradash.merge(model)
    torch.testing.assert_close(model(X), y, rtol=1e-5, atol=1e-6)
    loradash.unmerge(model)
    assert torch.equal(model(X), y)
    with loradash.disable(model):
        assert (model(X) - y).abs().max() > 1e-3
    save_adapter(model, tmp_path)
    other = make_model(dialect, "restated", warmup=6)
    patch(other)
    load_adapter(other, tmp_path)
    assert torch.equal(other(X), y) and dash_state(other).step == 10
    summary = loradash.summary(model)
    assert summary.layers == 2 and summary.other_trainable in (0, 16)


@pytest.mark.parametrize("dialect", DIALECTS)
@both_semantics
def test_state_dicts_go_on_where_they_stopped(dialect, semantics):
    """FLAG and the phase are in them, which theirs leaves out; a state dict of theirs is read too."""
    for steps in (4, 9):
        model = make_model(dialect, "restated", warmup=6)
        patch(model, semantics)
        schedule = DashSchedule(model, progress=False) if semantics == "loradash" else None
        trained(model, steps, schedule)
        other = make_model(dialect, "restated", warmup=6, seed=5)
        patch(other, semantics)
        other.load_state_dict(model.state_dict())
        assert (
            dash_state(other).step == dash_state(model).step == (7 if semantics == "authors" and steps > 7 else steps)
        )
        found, wanted = (
            [(layer.calls(), bool(layer.launched)) for layer in dash_layers(m).values()] for m in (other, model)
        )
        assert found == wanted
        with torch.no_grad():
            assert torch.equal(other(X), model(X))
    for steps in (4, 9):
        theirs = trained(make_model(dialect, "restated", warmup=6), steps)
        other = make_model(dialect, "restated", warmup=6, seed=5)
        patch(other, semantics)
        other.load_state_dict(theirs.state_dict())
        assert [bool(layer.launched) for layer in dash_layers(other).values()] == [steps > 6] * 2
        with torch.no_grad():
            torch.testing.assert_close(other(X), theirs(X), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dialect", DIALECTS)
def test_a_merged_update_never_counts_twice(dialect):
    """CR_MR's layers merge in eval: their state dicts hold the frozen weight whether merged or not."""
    model, other = (make_model(dialect, "restated", warmup=6) for _ in range(2))
    patch(trained(model, 9)), patch(other)
    y = model(X)
    loradash.merge(model)
    if dialect == "cr_mr":
        other.load_state_dict(model.state_dict())
        loradash.unmerge(model)
        assert torch.equal(other(X), model(X))
        return
    with pytest.raises(ValueError, match=r"0: the state dict is that of a merged model.*unmerge\(model\)"):
        other.load_state_dict(model.state_dict())
    with pytest.raises(ValueError, match=r"0 is merged; unmerge\(model\) before load_state_dict"):
        model.load_state_dict(other.state_dict())
    torch.testing.assert_close(model(X), y, rtol=1e-5, atol=1e-6)


def test_a_launched_checkpoint_in_their_model_is_launched():
    """Their FLAG starts at 0 again after load_state_dict; patched, the phase is that of U."""
    theirs = trained(make_model("cr_mr", "restated", warmup=6), 9)
    resumed = make_model("cr_mr", "restated", warmup=6, seed=3)
    resumed.load_state_dict(theirs.state_dict())
    assert resumed[0].FLAG == 0
    patch(resumed, "authors")
    torch.testing.assert_close(resumed(X), theirs(X), rtol=1e-5, atol=1e-6)
    assert resumed[0].FLAG == 7


class MergedLinear(nn.Linear):
    def __init__(self, k, n):
        super().__init__(k, n)
        self.lora_A, self.lora_B = nn.Parameter(torch.zeros(2, k)), nn.Parameter(torch.zeros(n, 2))


class Embedding(nn.Embedding):
    def __init__(self, k, n):
        super().__init__(k, n)
        self.lora_A, self.lora_B = nn.Parameter(torch.zeros(2, k)), nn.Parameter(torch.zeros(n, 2))


def test_what_is_left_alone_is_listed():
    layers = {
        name: make_layer("cr_mr", "restated", 8, 9) for name in ("good", "replaced", "merged", "trains", "hooked")
    }
    layers["replaced"].forward = lambda x: x
    layers["merged"].merged = True
    layers["trains"].weight.requires_grad_(True)
    layers["hooked"].lora_A.register_forward_hook(lambda *_: None)
    two = make_layer("sdg", "restated", 8, 9)
    two.lora_A["second"] = nn.Linear(8, 4, bias=False)
    subclass = make_layer("loralib", "restated", 8, 9)
    subclass.__class__ = type("Other", (type(subclass),), {})
    more = {"fused": MergedLinear(8, 9), "words": Embedding(8, 9), "two": two, "subclass": subclass}
    model = nn.ModuleDict({**layers, **more, "plain": nn.Linear(8, 8)})
    for parameter in model["plain"].parameters():
        parameter.requires_grad_(False)
    before = {name: type(m) for name, m in model.items()}
    # An adapter's file keeps modules that train as a whole.
    for name in (*more, "replaced", "merged", "trains", "hooked"):
        model[name].requires_grad_(name == "trains")
    report = patch(model)
    assert report.patched == {"good": "cr_mr"}
    assert report.left == {
        "replaced": "Linear: its forward was replaced",
        "merged": "Linear: merged; unmerge it first",
        "trains": "Linear: its weight trains",
        "hooked": "Linear: hooks on lora_A would not run",
        "fused": "MergedLinear: no LoRA-Dash in this class",
        "words": "Embedding: no LoRA-Dash in this class",
        "two": "Linear: 2 adapters (default, second); one can be patched",
        "subclass": "Other: no LoRA-Dash in this class",
    }
    assert "words: Embedding" in str(report)
    assert {name: type(m) for name, m in model.items() if name != "good"} == {
        n: c for n, c in before.items() if n != "good"
    }


def unchanged(model, error, match, **arguments):
    classes, attributes = [type(m) for m in model.modules()], [set(vars(m)) for m in model.modules()]
    buffers = dict(model.named_buffers())
    with pytest.raises(error, match=match):
        patch(model, **arguments)
    assert [type(m) for m in model.modules()] == classes and [set(vars(m)) for m in model.modules()] == attributes
    assert dict(model.named_buffers()).keys() == buffers.keys()


def test_what_cannot_be_patched_is_left_as_it_was():
    unchanged(nn.Sequential(nn.Linear(3, 3)), ValueError, "no LoRA-Dash layer of the authors' classes can be patched")
    parallel = nn.DataParallel(make_model("loralib", "restated"))
    unchanged(parallel, ValueError, "the model is wrapped in DataParallel; patch comes before it")
    unchanged(make_model("loralib", "restated"), ValueError, "semantics must be one of", semantics="mine")
    for step in (-1, 2.5, True, "3"):
        unchanged(make_model("loralib", "restated"), ValueError, "step must be an integer of at least 0", step=step)
    unchanged(
        make_model("sdg", "restated"), ValueError, "step is for semantics='loradash'", semantics="authors", step=3
    )
    model = make_model("loralib", "restated")
    model[0].FLAG = 3
    unchanged(model, ValueError, "FLAG is 3 in 0 and 0 in 2: say how many optimizer steps were taken: step=")
    patch(copy.deepcopy(model), step=2)
    model[0].FLAG = 101
    unchanged(
        model, ValueError, "launched is True in 0 and False in 2: semantics='authors' takes layers in different phases"
    )
    patch(copy.deepcopy(model), "authors")
    for dialect in DIALECTS:
        model = make_model(dialect, "restated")
        model[2].warmup = 50
        unchanged(model, ValueError, r"warmup \(prelaunch_steps\) is 100 in 0 and 50 in 2")
        model = make_model(dialect, "restated")
        # This is found out while the last layer is taken.
        drop = nn.Dropout(1.0)
        model[2].lora_dropout = nn.ModuleDict({"default": drop}) if dialect == "sdg" else drop
        unchanged(model, ValueError, r"dropout must be a number in \[0, 1\)")
    unchanged(nn.Sequential(Linear(4, 4, r=2)), ValueError, "runs on the operator as it is")
    model = make_model("loralib", "restated")
    patch(model)
    with pytest.raises(ValueError, match=r"adapted already; unpatch\(model\) first"):
        patch(model)
    with pytest.raises(ValueError, match="already"):
        apply_dash(model)
    unpatch(model)
    for other in (model, nn.Sequential(Linear(4, 4, r=2))):
        with pytest.raises(ValueError, match="the model was not patched"):
            unpatch(other)


def test_authors_layers_in_different_phases_keep_their_counts():
    model = make_model("loralib", "restated", warmup=6)
    model[2].FLAG = 4
    patch(model, "authors")
    trained(model, 3)
    assert [model[0].FLAG, model[2].FLAG] == [3, 7]
    with pytest.raises(ValueError, match="FLAG is 3 in 0 and 7 in 2"):
        save_adapter(model, "unwritten")


def test_widths_and_ranks_of_their_own_become_overrides(tmp_path):
    torch.manual_seed(0)
    layers = [make_layer("loralib", "restated", 24, 20, r=4), make_layer("loralib", "restated", 20, 20, r=4)]
    layers.append(make_layer("loralib", "restated", 20, 16, r=2, alpha=6))
    model = nn.Sequential(*layers)
    patch(model)
    config = dash_state(model).config
    assert (config.r, config.alpha, config.for_module("2").r, config.for_module("2").alpha) == (4, 8, 2, 6)
    save_adapter(model, tmp_path)
    plain = nn.Sequential(nn.Linear(24, 20), nn.Linear(20, 20), nn.Linear(20, 16))
    load_adapter(plain, tmp_path)
    assert dash_layers(plain)["2"].scaling == 3.0


def test_a_head_that_trains_is_in_the_adapter_file(tmp_path):
    model = nn.Sequential(make_model("loralib", "restated", warmup=6), nn.Linear(16, 16))
    patch(model)
    assert dash_state(model).config.trainable_modules == "1"
    trained(model, 2, DashSchedule(model, progress=False))
    save_adapter(model, tmp_path)
    plain = nn.Sequential(nn.Sequential(nn.Linear(24, 32), nn.Tanh(), nn.Linear(32, 16)), nn.Linear(16, 16))
    load_adapter(plain, tmp_path)
    assert torch.equal(plain[1].weight, model[1].weight)


def test_what_trains_in_part_is_told():
    model = nn.Sequential(make_model("loralib", "restated"), nn.Linear(16, 2))
    model[1].weight.requires_grad_(False)
    with pytest.warns(UserWarning, match="1.bias trains and 1.weight does not: save_adapter keeps modules"):
        patch(model)
    assert dash_state(model).config.trainable_modules is None


@pytest.mark.parametrize("dialect", DIALECTS)
def test_groups_of_parameters_and_unloading(dialect):
    model = make_model(dialect, "restated", warmup=6)
    patch(model)
    groups = {group["name"]: group["params"] for group in loradash.dash_parameter_groups(model, lr=0.1, sigma_lr=1.0)}
    own = {id(p) for p in model.parameters()}
    assert {name: len(group) for name, group in groups.items()} == {"adapters": 4, "sigma": 2}
    assert all(id(p) in own for group in groups.values() for p in group)
    with pytest.raises(ValueError, match="0 is a layer of another framework's class"):
        loradash.merge_and_unload(model)
    assert not any(layer.merged for layer in dash_layers(model).values())


@pytest.mark.parametrize("dialect", DIALECTS)
def test_one_graph_before_and_after_launch(dialect):
    torch._dynamo.reset()
    model = make_model(dialect, "restated", warmup=6)
    patch(model)
    graphs = []
    compiled = torch.compile(model, fullgraph=True, backend=lambda graph, _: graphs.append(1) or graph)
    trained(compiled, 9, DashSchedule(model, progress=False))
    assert len(graphs) == 1 and all(bool(layer.launched) for layer in dash_layers(model).values())
    torch.testing.assert_close(compiled(X), model(X))


def test_sdg_merges_as_its_fork_does(tmp_path):
    """Their merge_and_unload calls merge, which asks for get_delta_weight."""
    model = make_model("sdg", "restated", warmup=6)
    patch(model)
    trained(model, 9, DashSchedule(model, progress=False))
    layer = model[0]
    torch.testing.assert_close(layer.get_delta_weight("default"), adapted_of(model, "0").delta())
    y = layer(X)
    weight = layer.base_layer.weight.data.clone()
    layer.base_layer.weight.data = weight + layer.get_delta_weight("default")
    layer.merged = True
    torch.testing.assert_close(layer(X), y, rtol=1e-5, atol=1e-6)
    layer.base_layer.weight.data, layer.merged = weight, False
    layer.disable_adapters = True
    assert torch.equal(layer(X), layer.base_layer(X))
    layer.disable_adapters = False
    layer.active_adapters = ["default", "other"]
    with pytest.raises(ValueError, match=r"0: a patched layer computes its one adapter 'default'"):
        layer(X)


def test_sdg_calls_a_base_layer_that_is_more_than_a_product():
    model = make_model("sdg", "restated", warmup=6)
    trained(model, 9)
    plain = copy.deepcopy(model)
    seen = []
    for m in (model, plain):
        m[0].base_layer.register_forward_hook(lambda *_: seen.append(1))
    patch(model)
    y = model(X)
    torch.testing.assert_close(y, plain(X), rtol=1e-5, atol=1e-6)
    assert len(seen) == 2
    loradash.merge(model)
    torch.testing.assert_close(model(X), y, rtol=1e-5, atol=1e-6)
    assert len(seen) == 3, "merged, the base layer is called as well"


@pytest.mark.parametrize("dialect", DIALECTS)
@both_semantics
def test_a_copy_of_a_patched_model_is_whole(dialect, semantics):
    model = make_model(dialect, "restated", warmup=6)
    patch(model, semantics)
    trained(model, 9, DashSchedule(model, progress=False) if semantics == "loradash" else None)
    other = copy.deepcopy(model)
    y = model(X)
    assert torch.equal(other(X), y)
    inside = {id(m) for m in other.modules()}
    layers = dash_layers(other)
    assert all(id(getattr(layer, "host", layer)) in inside for layer in layers.values())
    trained(other, 2)
    assert torch.equal(model(X), y) and (other(X) - y).abs().max() > 0
    unpatch(other)
    assert [type(m) for m in other.modules()] == [type(m) for m in make_model(dialect, "restated").modules()]


def test_conversions_of_the_model_take_everything_along():
    for dialect in DIALECTS:
        model = make_model(dialect, "restated", warmup=6)
        patch(model)
        trained(model, 9, DashSchedule(model, progress=False))
        y = model(X)
        loradash.merge(model)
        model.double()
        loradash.unmerge(model)
        assert {t.dtype for t in model.state_dict().values() if t.is_floating_point()} == {torch.float64}
        torch.testing.assert_close(model(X.double()), y.double(), rtol=1e-5, atol=1e-6)
