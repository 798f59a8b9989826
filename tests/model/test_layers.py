"""What becomes of every kind of layer: adopted, kept whole, refused; and of code around it."""

from __future__ import annotations

import copy
import re
import sys
import warnings

import loradash
import pytest
import torch
from loradash import DashLinear, apply_dash, dash_layers
from support.layers import LAYERS, WIDTH, Richer, Scaled, Tuple, config, linear
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import prune


@pytest.fixture(params=LAYERS, ids=[re.sub(r"\W+", "-", name).strip("-") for name in LAYERS])
def kind(request):
    make, outcome = LAYERS[request.param]
    return request.param, make(), outcome


def outcome_of(layer):
    model = nn.ModuleDict({"layer": layer, "plain": linear()})
    before = {n: p.requires_grad for n, p in model.named_parameters()}
    try:
        apply_dash(model, config())
    except ValueError as refusal:
        if "layer: " not in str(refusal):
            raise
        assert model["layer"] is layer and type(model["plain"]) is nn.Linear
        assert before == {n: p.requires_grad for n, p in model.named_parameters()}
        return "refused"
    return "adopted" if model["layer"].base is None else "kept whole"


def test_layers(kind):
    _, layer, expected = kind
    assert outcome_of(layer) == expected


def test_a_fresh_adapter_changes_no_output(kind):
    _, layer, outcome = kind
    if outcome == "refused":
        return
    x = torch.randn(7, WIDTH)
    expected = layer(x).detach()
    dash = DashLinear.from_linear(layer, config())
    torch.testing.assert_close(dash(x), expected, rtol=1e-4, atol=1e-5)
    dash.enabled = False
    torch.testing.assert_close(dash(x), expected, rtol=1e-4, atol=1e-5)


def test_an_update_is_added_and_learns(kind):
    _, layer, outcome = kind
    if outcome == "refused":
        return
    dash = DashLinear.from_linear(layer, config())
    nn.init.normal_(dash.lora_b)
    x = torch.randn(7, dash.in_features)
    base = layer(x).detach()
    y = dash(x)
    torch.testing.assert_close(y, base + x @ dash.delta().t(), rtol=1e-3, atol=1e-3)
    y.square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in (dash.lora_a, dash.lora_b))
    assert not any(p.requires_grad for p in layer.parameters())


def test_the_weight_it_multiplies_with(kind):
    """What the directions are sought in is the W of the layer's own outputs, whatever hooks and hosts there are."""
    _, layer, outcome = kind
    if outcome == "refused":
        return
    dash = DashLinear.from_linear(layer, config())
    weight = dash.weight_nk()
    assert weight.shape == (dash.out_features, dash.in_features)
    zero = dash(torch.zeros(1, dash.in_features))
    x = torch.eye(dash.in_features)[:5]
    torch.testing.assert_close(weight.t()[:5].float(), (dash(x) - zero).detach(), rtol=1e-4, atol=1e-4)


def test_pre_launch_of_every_kind(kind):
    _, layer, outcome = kind
    if outcome == "refused":
        return
    model = apply_dash(nn.Sequential(layer), config())
    nn.init.normal_(model[0].lora_b)
    loradash.prelaunch(model, progress=False)
    dash = model[0]
    assert bool(dash.launched)
    weight = dash.weight_nk().float()
    torch.testing.assert_close(
        weight @ dash.dash_vt.t(), dash.dash_u * (weight @ dash.dash_vt.t()).norm(dim=0), rtol=1e-2, atol=1e-3
    )


def test_hooks_run_once_and_not_for_the_directions():
    seen = []
    layer = linear()
    layer.register_forward_pre_hook(lambda *_: seen.append("before"))
    layer.register_forward_hook(lambda *_: seen.append("after"))
    model = apply_dash(nn.Sequential(layer), config())
    nn.init.normal_(model[0].lora_b)
    model(torch.randn(3, WIDTH))
    assert seen == ["before", "after"]
    loradash.prelaunch(model, progress=False)
    assert seen == ["before", "after"]


def test_a_layer_kept_whole_answers_for_its_weight():
    layer = Scaled(WIDTH, 8)
    dash = DashLinear.from_linear(layer, config())
    assert dash.weight is layer.weight and dash.bias is layer.bias
    assert (dash.in_features, dash.out_features) == (WIDTH, 8)
    assert isinstance(next(m for m in dash.modules() if isinstance(m, nn.Linear)).weight, nn.Parameter)
    other = nn.Parameter(torch.randn(8, WIDTH), requires_grad=False)
    # Tied embeddings are set like this.
    dash.weight = other
    assert layer.weight is other and "weight" not in dash._parameters
    with pytest.raises(AttributeError, match="nothing_of_that_name"):
        dash.nothing_of_that_name  # noqa: B018
    assert not hasattr(dash, "_hf_hook")


def test_what_only_the_base_layer_has_is_set_there():
    model = apply_dash(nn.Sequential(Richer(WIDTH, WIDTH)), config())
    dash, base = model[0], model[0].base
    dash.gain = nn.Parameter(torch.zeros(WIDTH))
    assert base.gain is dash.gain and not base.gain.any()
    assert "gain" not in dash._parameters
    dash.enabled, dash.name = False, "other"
    assert not hasattr(base, "enabled")
    assert not hasattr(base, "name")
    assert torch.equal(dash.doubled(torch.ones(1, WIDTH)), 2 * base(torch.ones(1, WIDTH)))


def test_marks_on_a_layer_stay_on_it():
    layer = linear()
    layer.role, layer._is_hf_initialized = "expert", True
    dash = apply_dash(nn.Sequential(layer), config())[0]
    assert dash.base is None
    assert dash.role == "expert"
    assert dash._is_hf_initialized


class Nested(nn.Linear):
    def __init__(self):
        super().__init__(WIDTH, WIDTH)
        self.low = linear()

    def forward(self, x):
        return super().forward(x) + self.low(x)


def test_a_layer_inside_another_is_a_part_of_it(tmp_path):
    model, x = apply_dash(nn.Sequential(Nested()), config()), torch.randn(2, WIDTH)
    assert list(dash_layers(model)) == ["0"]
    nn.init.normal_(model[0].lora_b)
    fresh = nn.Sequential(copy.deepcopy(model[0].base))
    loradash.save_adapter(model, tmp_path)
    assert torch.equal(loradash.load_adapter(fresh, tmp_path)(x), model(x))
    assert list(dash_layers(apply_dash(nn.Sequential(Nested()), config(target_modules=["low"])))) == ["0.low"]


@pytest.mark.parametrize("kept_whole", [False, True])
def test_a_weight_that_trains_elsewhere_is_refused(kept_whole):
    embedding, head = nn.Embedding(9, WIDTH), nn.Linear(WIDTH, 9, bias=False)
    head.weight = embedding.weight
    if kept_whole:
        head.register_forward_hook(lambda *_: None)
    model = nn.Sequential(embedding, head)
    with pytest.raises(ValueError, match="the weight of 1 is tied to one of theirs"):
        apply_dash(model, config(trainable_modules=["0"]))
    assert type(model[1]) is nn.Linear
    assert head.weight.requires_grad


class Delegating(nn.Module):
    """Answers with what a child has."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.inner, name)

    def forward(self, x):
        return self.inner(x)


def test_the_model_that_was_given_is_returned():
    for compiled in (False, True):
        inner = nn.Sequential(linear())
        inner = torch.compile(inner, backend="eager") if compiled else inner
        for model in (inner, Delegating(copy.deepcopy(inner))):
            assert apply_dash(model, config()) is model
            assert len(dash_layers(model)) == 1


class Gained(nn.Linear):
    """Takes more than x, as layers of diffusers do."""

    def forward(self, x, gain=1.0):
        return gain * super().forward(x)


def test_arguments_beside_the_input():
    x = torch.randn(3, WIDTH)
    dash = DashLinear.from_linear(Gained(WIDTH, 8), config())
    torch.testing.assert_close(dash(x, gain=3.0), 3 * dash(x))
    plain = DashLinear(WIDTH, 8, config=config())
    assert torch.equal(plain(input=x), plain(x))
    with pytest.raises(TypeError, match=r"DashLinear takes one tensor, got further arguments \['gain'\]"):
        plain(x, gain=3.0)


def test_an_output_that_is_no_tensor_is_refused():
    model = apply_dash(nn.ModuleDict({"megatron": Tuple(8, 8)}), config())
    with pytest.raises(TypeError, match="megatron: Tuple returned tuple"):
        model["megatron"](torch.randn(2, 8))


def test_quantised_after_it_was_adapted():
    torchao = pytest.importorskip("torchao.quantization")
    dash = DashLinear.from_linear(nn.Linear(64, 64), config())
    nn.init.normal_(dash.lora_b)
    x = torch.randn(5, 64)
    expected = dash(x)
    torchao.quantize_(dash, torchao.Int8WeightOnlyConfig(), filter_fn=lambda module, name: module is dash)
    torch.testing.assert_close(dash(x), expected, rtol=0.05, atol=0.05)
    with pytest.raises(ValueError, match="quantised and cannot take the update"):
        dash.merge()


def test_a_sharded_layer_is_refused():
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        model = nn.ModuleDict({"sharded": linear(), "plain": linear()})
        model["sharded"].weight = nn.Parameter(distribute_tensor(torch.randn(WIDTH, WIDTH), mesh, [Shard(0)]))
        with pytest.raises(ValueError, match=r"sharded: Linear is sharded \(DTensor\); adapt the model first"):
            apply_dash(model, config())
        assert type(model["plain"]) is nn.Linear and model["plain"].weight.requires_grad
    finally:
        torch.distributed.destroy_process_group()


def test_a_layer_divided_by_transformers_is_refused():
    """Some of its releases leave each process a plain tensor, its part of the weight."""
    part = linear()
    part._hf_tp_plan = "colwise"
    with pytest.raises(ValueError, match=r"part: Linear is divided over processes by a tp_plan.*without tp_plan"):
        apply_dash(nn.ModuleDict({"part": part}), config())


def test_weights_that_are_plain_attributes():
    """DataParallel's replicas, pruning and parametrizations keep tensors outside of the module's parameters."""
    x = torch.randn(3, WIDTH)
    layer = DashLinear(WIDTH, 8, config=config())
    nn.init.normal_(layer.lora_b)
    replica = layer._replicate_for_data_parallel()
    for name, tensor in {**layer._parameters, **layer._buffers}.items():
        setattr(replica, name, None if tensor is None else tensor.clone())
    torch.testing.assert_close(replica(x), layer(x))
    prune.l1_unstructured(layer, "weight", amount=0.5)
    torch.testing.assert_close(layer(x), F.linear(x, layer.weight + layer.delta(), layer.bias), rtol=1e-4, atol=1e-4)
    nn.utils.parametrize.register_parametrization(layer, "lora_a", nn.Identity())
    torch.testing.assert_close(layer(x), F.linear(x, layer.weight + layer.delta(), layer.bias), rtol=1e-4, atol=1e-4)


class Model(nn.Module):
    """A child called `module`, as wrappers have."""

    def __init__(self):
        super().__init__()
        self.module, self.head = nn.Sequential(linear()), nn.Linear(WIDTH, 2)

    def forward(self, x):
        return self.head(self.module(x))


class Engine(nn.Module):
    """A wrapper of another library."""

    def __init__(self, model):
        super().__init__()
        self.module = model


def test_adapters_are_found_wherever_they_sit():
    model = apply_dash(Model(), config())
    names = {"module.0", "head"}
    for outside in (
        model,
        Engine(model),
        nn.DataParallel(model),
        torch.compile(model),
        nn.ModuleDict({"deep": Engine(model)}),
    ):
        assert set(dash_layers(outside)) == names
        assert loradash.dash_state(outside) is loradash.dash_state(model)
    two = nn.ModuleList([model, apply_dash(Model(), config())])
    with pytest.raises(ValueError, match="several parts of the model were adapted apart"):
        dash_layers(two)
    part = nn.ModuleList([apply_dash(Model(), config()), Model()])
    with pytest.raises(ValueError, match="adapters already, in 0"):
        apply_dash(part, config())


def test_errors_of_a_forward_name_the_layer():
    model = apply_dash(nn.ModuleDict({"lm_head": linear()}), config())
    with pytest.raises(ValueError, match=r"lm_head: weight has shape \(32, 32\); wanted \(N, 5\)"):
        model["lm_head"](torch.randn(2, 5))
    model["lm_head"].weight = nn.Parameter(torch.randn(40, WIDTH), requires_grad=False)
    with pytest.raises(ValueError, match=r"the adapter was made for \(32, 32\); resize embeddings before apply_dash"):
        model["lm_head"](torch.randn(2, WIDTH))


def test_no_warning_where_nothing_is_wrong():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        apply_dash(Model(), config())


def test_a_layer_kept_whole_beside_sharded_ones(monkeypatch):
    """Where other layers are gathered, its W is still that of its own products."""
    model = apply_dash(nn.Sequential(linear(), Scaled(WIDTH, WIDTH)), config(svd="exact"))
    for layer in dash_layers(model).values():
        nn.init.normal_(layer.lora_b)
    monkeypatch.setattr(sys.modules["loradash.prelaunch"], "is_sharded", lambda tensor: tensor is model[0].weight)
    _, report = loradash.prelaunch(model, progress=False)
    sigma = torch.linalg.svdvals(3 * model[1].base.weight)
    torch.testing.assert_close(report.sigma, sigma[report.index], rtol=1e-4, atol=1e-4)
