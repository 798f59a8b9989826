"""`warm_up`: every kind of layer runs with every number of rows, and nothing of the model shows it."""

from __future__ import annotations

from types import SimpleNamespace

import loradash
import pytest
import torch
from loradash import DashConfig, DashSchedule, apply_dash, warm_up
from loradash.warming import _activations
from support.layers import config, hooked, linear
from torch import nn

from loradash_kernels.packed_weights import invalidate_packed_weights, packed_weight_bytes


def adapted(dtype=torch.float32, **settings):
    torch.manual_seed(0)
    layers = [nn.Linear(24, 40), nn.Linear(40, 40), nn.Linear(40, 40), nn.Linear(40, 24, bias=False)]
    model = nn.Sequential(*layers, nn.Dropout(0.5), nn.BatchNorm1d(24)).to(dtype)
    return apply_dash(model, DashConfig(**{"r": 2, "directions": 2, **settings}))


def kinds(done):
    return {(run.out_features, run.in_features, run.rows, run.passes) for run in done}


BOTH = ("forward", "backward")


def test_every_kind_with_every_number_of_rows():
    model = adapted(dropout=0.1)
    done = warm_up(model, rows=[3, 70, 3], progress=False)
    shapes = [(40, 24), (40, 40), (24, 40)]
    assert kinds(done) == {(*shape, rows, BOTH) for shape in shapes for rows in (3, 70)}
    # The second layer of one kind runs once, for its own weight.
    assert [(run.name, run.rows) for run in done] == [
        *(("0", 3), ("0", 70), ("1", 3), ("1", 70), ("2", 70), ("3", 3), ("3", 70))
    ]
    assert [run.layers for run in done] == [1, 1, 2, 2, 2, 1, 1]
    assert all(run.seconds > 0 and run.device.type == "cpu" and run.dtype == torch.float32 for run in done)


def test_eval_and_no_grad_run_forward_alone():
    model = adapted().eval()
    assert {run.passes for run in warm_up(model, rows=[3], progress=False)} == {("forward",)}
    model.train()
    with torch.no_grad():
        assert {run.passes for run in warm_up(model, rows=[3], progress=False)} == {("forward",)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_activations_have_the_dtype_of_the_weights(dtype):
    assert {run.dtype for run in warm_up(adapted(dtype), rows=[3], progress=False)} == {dtype}


@pytest.mark.parametrize("stored", [torch.uint8, torch.int8, torch.float8_e4m3fn])
def test_activations_of_quantised_layers(stored):
    layer = SimpleNamespace(weight=torch.empty(2, 2, dtype=stored))
    assert _activations(layer, None) == torch.float32 and _activations(layer, torch.bfloat16) == torch.bfloat16


def test_the_model_is_as_it_was():
    """Parameters, their gradients, buffers, modes, versions and random numbers; hooks and DashSchedule see nothing."""
    model = adapted(dropout=0.1, train_bias=True)
    model[1].eval()
    model(torch.randn(5, 24)).sum().backward()
    called = []
    for module in model.modules():
        module.register_forward_hook(lambda *_: called.append("forward"))
        module.register_full_backward_hook(lambda *_: called.append("backward"))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.register_hook(lambda gradient: called.append("gradient"))
            parameter.register_post_accumulate_grad_hook(lambda parameter: called.append("accumulated"))
    state = {name: (t, t.clone(), t._version) for name, t in model.state_dict(keep_vars=True).items()}
    gradients = {name: (p.grad, p.grad.clone()) for name, p in model.named_parameters() if p.grad is not None}
    modes = {name: module.training for name, module in model.named_modules()}
    before = torch.get_rng_state()
    warm_up(model, rows=[3, 70], progress=False)
    assert called == [] and torch.equal(torch.get_rng_state(), before)
    assert {name: module.training for name, module in model.named_modules()} == modes
    for name, t in model.state_dict(keep_vars=True).items():
        same, values, version = state[name]
        assert t is same and torch.equal(t, values) and t._version == version, name
    for name, parameter in model.named_parameters():
        if name in gradients:
            same, values = gradients[name]
            assert parameter.grad is same and torch.equal(parameter.grad, values), name
        else:
            assert parameter.grad is None


def test_unused_layers_are_still_noticed():
    """Warming up gives no gradient that DashSchedule would take for one of training."""
    model = adapted()
    schedule = DashSchedule(model, progress=False)
    warm_up(model, rows=[3], progress=False)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model[1](model[0](torch.randn(3, 24))).sum().backward()
    optimizer.step()
    with pytest.warns(UserWarning, match="no gradient for 2 of 4 adapted layers"):
        schedule.step()


@pytest.mark.parametrize("phase", ["launched", "merged", "disabled", "dash only"])
def test_in_every_phase(phase):
    model = adapted()
    for layer in loradash.dash_layers(model).values():
        nn.init.normal_(layer.lora_b)
    loradash.prelaunch(model, progress=False)
    if phase == "merged":
        loradash.merge(model)
    if phase == "dash only":
        loradash.dash_only(model)
    for layer in loradash.dash_layers(model).values():
        layer.enabled = phase != "disabled"
    assert kinds(warm_up(model, rows=[3], progress=False)) == {
        (*shape, 3, BOTH) for shape in [(40, 24), (40, 40), (24, 40)]
    }


def test_layers_kept_whole():
    model = apply_dash(nn.Sequential(linear(), hooked()), config())
    done = warm_up(model, rows=[3], progress=False)
    assert [run.name for run in done] == ["0", "1"] and {run.passes for run in done} == {BOTH}


def test_weights_are_packed_by_then():
    """The steps that follow pack nothing more."""
    torch.manual_seed(0)
    model = apply_dash(nn.Sequential(nn.Linear(256, 256), nn.Linear(256, 256)), DashConfig(r=2, directions=2))
    invalidate_packed_weights()
    warm_up(model, rows=[128], progress=False)
    warm = packed_weight_bytes()
    for _ in range(3):
        model(torch.randn(128, 256, requires_grad=True)).sum().backward()
    assert packed_weight_bytes() == warm
    invalidate_packed_weights()
    for _ in range(3):
        model(torch.randn(128, 256, requires_grad=True)).sum().backward()
    assert packed_weight_bytes() == warm


def test_one_bar_for_all(capsys):
    warm_up(adapted(), rows=[3])
    said = capsys.readouterr().err
    assert "warm-up" in said and "4/4" in said
    warm_up(adapted(), rows=[3], progress=False)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("rows", [[], [0], [2.0], [True], ["8"]])
def test_bad_rows(rows):
    with pytest.raises(ValueError, match="rows must be positive integers"):
        warm_up(adapted(), rows=rows)


def test_models_that_cannot(monkeypatch):
    with pytest.raises(ValueError, match="no LoRA-Dash adapters"):
        warm_up(nn.Sequential(nn.Linear(3, 4)), rows=[3])
    with pytest.raises(ValueError, match="on meta: 0, 1"):
        warm_up(adapted().to("meta"), rows=[3])
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="before a CUDA graph is captured"):
        warm_up(adapted(), rows=[3])


def test_a_layer_that_fails_is_named():
    model = adapted()
    model[2].weight = nn.Parameter(torch.randn(40, 41), requires_grad=False)
    with pytest.raises(RuntimeError, match=r"warm_up: 2 fails with 7 rows: ValueError: .*41"):
        warm_up(model, rows=[7], progress=False)
