"""Fused projections with an adapter for each of their parts: as separate layers, in training, files, merges and exports."""

from __future__ import annotations

import copy
import pickle

import loradash
import loradash.split
import pytest
import torch
from loradash import (
    DashConfig,
    DashSchedule,
    apply_dash,
    dash_layers,
    export_lora,
    join_projections,
    load_adapter,
    merge,
    merge_and_unload,
    prelaunch,
    save_adapter,
    split_projections,
    unmerge,
)
from loradash.split import SplitLinear
from torch import nn
from torch.nn.utils import parametrizations

SIZES = {"q": 12, "k": 6, "v": 6}
K = 16
CONFIG = {"r": 3, "alpha": 6, "directions": 2, "target_modules": ["q", "k", "v"], "prelaunch_steps": 2}


class Fused(nn.Module):
    """One layer that may be fused, as nn.Linear or Conv1D, and another."""

    def __init__(self, conv1d=False):
        super().__init__()
        if conv1d:
            transformers = pytest.importorskip("transformers")
            self.qkv = transformers.pytorch_utils.Conv1D(24, K)
        else:
            self.qkv = nn.Linear(K, 24)
        self.out = nn.Linear(24, 4)

    def forward(self, x):
        return self.out(self.qkv(x))


class Separate(Fused):
    """The same with three layers."""

    def __init__(self, fused):
        super().__init__()
        self.out = copy.deepcopy(fused.out)
        weight, self.qkv = fused.qkv.weight, None
        weight = weight if isinstance(fused.qkv, nn.Linear) else weight.t()
        start = 0
        for name, n in SIZES.items():
            layer = nn.Linear(K, n)
            layer.weight.data = weight[start : start + n].detach().clone()
            layer.bias.data = fused.qkv.bias[start : start + n].detach().clone()
            setattr(self, name, layer)
            start += n

    def forward(self, x):
        return self.out(torch.cat([self.q(x), self.k(x), self.v(x)], -1))


class Codes(torch.Tensor):
    """As torchao's weights are."""

    def dequantize(self):
        raise NotImplementedError


@pytest.fixture(params=[False, True], ids=["linear", "conv1d"])
def base(request):
    torch.manual_seed(0)
    model = Fused(request.param)
    nn.init.normal_(model.qkv.bias)
    return model


def adapted(base, **options):
    model = copy.deepcopy(base)
    assert split_projections(model, {"qkv": SIZES}) == ["qkv"]
    return apply_dash(model, DashConfig(**{**CONFIG, **options}))


def filled(model):
    """An adapter that looks trained and launched."""
    torch.manual_seed(1)
    with torch.no_grad():
        for layer in dash_layers(model).values():
            for t in (layer.lora_b, layer.dash_sigma, layer.dash_u, layer.dash_vt):
                t.normal_(std=0.3)
            layer.launched.fill_(True)
    return model


def x_of(seed=2):
    return torch.randn(5, 3, K, generator=torch.Generator().manual_seed(seed))


def trained(model, steps=5):
    schedule = DashSchedule(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.3)
    losses = []
    for step in range(steps):
        loss = (model(x_of(step)) - 1).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(loss.detach())
    return torch.stack(losses)


def test_as_separate_layers(base, monkeypatch):
    """Losses, gradients and directions through launch, in one operator a call."""
    calls, run = [], loradash.split.dash_linear_group
    monkeypatch.setattr(loradash.split, "dash_linear_group", lambda *a, **o: calls.append(len(a[1])) or run(*a, **o))
    fused = adapted(base, overrides={"k": {"r": 2}})
    apart = apply_dash(Separate(base), DashConfig(**CONFIG, overrides={"k": {"r": 2}}))
    theirs = dash_layers(apart)
    assert list(dash_layers(fused)) == ["qkv.q", "qkv.k", "qkv.v"]
    with torch.no_grad():
        for name, layer in dash_layers(fused).items():
            layer.lora_a.copy_(theirs[name[-1]].lora_a)
    torch.testing.assert_close(trained(fused), trained(apart))
    assert calls == [3] * 5
    for name, layer in dash_layers(fused).items():
        other = theirs[name[-1]]
        assert bool(layer.launched) and bool(layer.dash_sigma.any())
        torch.testing.assert_close(layer.delta(), other.delta(), rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(
            (layer.dash_u * layer.dash_sigma) @ layer.dash_vt,
            (other.dash_u * other.dash_sigma) @ other.dash_vt,
            rtol=1e-3,
            atol=1e-5,
        )
    assert not fused.qkv.weight.requires_grad and fused.qkv.weight.grad is None


def test_gradients_with_dropout_are_those_of_each_part_alone(base):
    """One mask for all: the parts called one by one draw it from the same seed."""
    model, x = filled(adapted(base, dropout=0.3)), x_of().requires_grad_()
    torch.manual_seed(3)
    y = model.qkv(x)
    y.square().sum().backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    dx, x.grad = x.grad.clone(), None
    model.zero_grad()
    parts = []
    for part in model.qkv.parts():
        torch.manual_seed(3)
        parts.append(part(x))
    again = torch.cat(parts, -1)
    torch.testing.assert_close(again, y)
    again.square().sum().backward()
    assert len(found) == 9
    for name, p in model.named_parameters():
        if name in found:
            torch.testing.assert_close(p.grad, found[name])
    torch.testing.assert_close(x.grad, dx)


def test_a_part_without_an_adapter_and_state_dict(base):
    model = filled(adapted(base, exclude_modules=["qkv.k"]))
    assert list(dash_layers(model)) == ["qkv.q", "qkv.v"]
    plain = base.qkv(x_of())
    y = model.qkv(x_of())
    torch.testing.assert_close(y[..., 12:18], plain[..., 12:18])
    assert not torch.allclose(y[..., :12], plain[..., :12]) and not torch.allclose(y[..., 18:], plain[..., 18:])
    state = model.state_dict()
    assert base.state_dict().keys() <= state.keys() and state["qkv.weight"].shape == base.qkv.weight.shape
    other = adapted(base, exclude_modules=["qkv.k"])
    other.load_state_dict(state)
    assert torch.equal(other(x_of()), model(x_of()))
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with torch.no_grad():
            copied.qkv.weight.zero_()
        assert not copied.qkv.q.weight.any() and model.qkv.q.weight.any()
    torch.testing.assert_close(model.double().qkv(x_of().double()).float(), y.detach())


def test_files(base, tmp_path):
    model = filled(adapted(base))
    save_adapter(model, tmp_path)
    again = copy.deepcopy(base)
    split_projections(again, {"qkv": SIZES})
    load_adapter(again, tmp_path)
    assert torch.equal(again(x_of()), model(x_of()))
    with pytest.raises(loradash.AdapterError, match=r"qkv\.k\.dash_sigma has no place in the model"):
        load_adapter(copy.deepcopy(base), tmp_path)
    empty = copy.deepcopy(base)
    split_projections(empty, {"qkv": SIZES})
    with pytest.raises(loradash.AdapterError, match="meta device"):
        load_adapter(empty.to("meta"), tmp_path)


def test_merging(base):
    model = filled(adapted(base))
    weight, before, y = model.qkv.weight, model.qkv.weight.clone(), model(x_of()).detach()
    merge(model)
    torch.testing.assert_close(model(x_of()), y)
    assert model.qkv.weight is not weight and torch.equal(weight, before)
    assert {key for key in model.state_dict() if key.count(".") == 1} == base.state_dict().keys()
    with pytest.raises(ValueError, match="qkv is merged; unmerge"):
        model.load_state_dict(base.state_dict(), strict=False)
    with loradash.disable(model):
        torch.testing.assert_close(model(x_of()), base(x_of()))
    model.qkv.q.unmerge()
    torch.testing.assert_close(model(x_of()), y)
    unmerge(model)
    assert model.qkv.weight is weight and torch.equal(weight, before)
    merge(model)
    unmerge(model.double())
    assert model.qkv.weight.dtype == torch.float64 and torch.equal(model.qkv.weight, before.double())
    model.float()
    merge_and_unload(model)
    assert type(model.qkv) is type(base.qkv) and model.state_dict().keys() == base.state_dict().keys()
    assert all(p.requires_grad for p in model.parameters())
    torch.testing.assert_close(model(x_of()), y)


def test_a_merge_that_fails_changes_nothing(base):
    model = filled(adapted(base))
    before, y = model.qkv.weight, model(x_of())
    with torch.no_grad():
        model.qkv.v.lora_b.fill_(float("inf"))
    with pytest.raises(ValueError, match=r"qkv\.v: the merged weight"):
        merge(model)
    assert model.qkv.weight is before
    torch.testing.assert_close(model.qkv.q(x_of()), filled(model).qkv.q(x_of()))
    torch.testing.assert_close(model(x_of()), y)


def test_served_by_peft(base, tmp_path):
    peft = pytest.importorskip("peft")
    model = filled(adapted(base, exclude_modules=["qkv.k"], overrides={"qkv.v": {"r": 1, "directions": 1}})).eval()
    y = model(x_of()).detach()
    export_lora(model, tmp_path)
    served = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    torch.testing.assert_close(served(x_of()), y, rtol=1e-4, atol=1e-5)
    assert served.peft_config["default"].r == 3 + 2 + 1 + 1
    torch.testing.assert_close(served.merge_and_unload()(x_of()), y, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("base", [False], indirect=True)
def test_what_hangs_on_a_part(base):
    """Hooks, a mixed batch and a second adapter: parts are called one by one, or are members without one."""
    model = filled(adapted(base))
    y, seen = model.qkv(x_of()), []
    handle = model.qkv.k.register_forward_hook(lambda *_: seen.append(1))
    torch.testing.assert_close(model.qkv(x_of()), y)
    assert seen
    handle.remove()
    model.qkv.k.eval()
    torch.testing.assert_close(model.qkv(x_of()), y)
    model.train()
    loradash.add_adapter(model, "other", DashConfig(**{**CONFIG, "target_modules": ["q"]}))
    with loradash.mixed_batch(model, ["default", None, "other", None, "default"]):
        mixed = model.qkv(x_of())
    plain = base.qkv(x_of())
    torch.testing.assert_close(mixed[0], y[0])
    torch.testing.assert_close(mixed[1], plain[1])
    loradash.set_adapter(model, "other")
    torch.testing.assert_close(model.qkv(x_of()), plain)
    assert list(dash_layers(model)) == ["qkv.q"]


@pytest.mark.parametrize("base", [False], indirect=True)
def test_hooks_on_a_part_outlive_its_adapter(base):
    model, seen = filled(adapted(base)), []
    handle = model.qkv.k.register_forward_hook(lambda *_: seen.append(1))
    y = model(x_of()).detach()
    torch.testing.assert_close(merge_and_unload(model)(x_of()), y)
    assert len(seen) == 2 and type(model.qkv) is SplitLinear
    with pytest.raises(ValueError, match=r"qkv\.k has hooks"):
        join_projections(model)
    handle.remove()
    model.qkv.k._forward_hooks.clear()
    join_projections(model)
    torch.testing.assert_close(model(x_of()), y)


@pytest.mark.parametrize("base", [False], indirect=True)
def test_compiled(base):
    torch._dynamo.reset()
    model = filled(adapted(base))
    fast = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(fast(x_of()), model(x_of()))


def test_joined_again(base):
    model = copy.deepcopy(base)
    layer, weight = model.qkv, model.qkv.weight
    split_projections(model, {"qkv": ("q", "k", "v")})
    assert isinstance(model.qkv, SplitLinear) and model.qkv.sizes == dict.fromkeys("qkv", 8)
    assert torch.equal(model(x_of()), base(x_of()))
    assert [tuple(part.weight.shape) for part in model.qkv.parts()] == [(8, K)] * 3
    join_projections(model)
    assert model.qkv is layer and layer.weight is weight
    split_projections(model, {"qkv": SIZES})
    apply_dash(model, DashConfig(target_modules=["q"]))
    with pytest.raises(ValueError, match=r"qkv\.q is a DashLinear; merge_and_unload"):
        join_projections(model)


@pytest.mark.parametrize(
    ("layers", "words"),
    [
        ({"qkv": {"q": 12, "k": 6}}, r"qkv has 24 outputs, and its parts have 12 \+ 6 = 18"),
        ({"qkv": {"q": 12, "k": 12.0}}, "integers of at least 1, got 12.0"),
        ({"qkv": ("a", "b", "c", "d", "e")}, "24 outputs, which are not 5 parts of one size"),
        ({"qkv": ("q",)}, "two names or more"),
        ({"qkv": "qk"}, "two names or more"),
        ({"qkv": ("q", "weight")}, "qkv: a part cannot be called so: .*weight"),
        ({"qkv": ("q", "a.b")}, r"a part cannot be called so: .*a\.b"),
        ({"none": ("q", "k")}, "'none' matches no module"),
        ({"norm": ("q", "k")}, "norm is a LayerNorm; only nn.Linear"),
        ({"out": ("q", "k"), "block.out": ("q", "k")}, r"'block\.out' matches block\.out, which another name"),
        ({"turned": ("q", "k")}, "turned: .* computes in a way of its own"),
        ({"codes": ("q", "k")}, "codes: .* computes in a way of its own"),
        ({"tied": ("q", "k")}, "tied: its weight is tied to that of embedding"),
    ],
)
def test_refused(layers, words):
    model = nn.ModuleDict(
        {"qkv": nn.Linear(4, 24), "norm": nn.LayerNorm(4), "tied": nn.Linear(4, 6), "embedding": nn.Embedding(6, 4)}
    )
    model["block"] = nn.ModuleDict({"out": nn.Linear(4, 4)})
    model["turned"] = parametrizations.orthogonal(nn.Linear(4, 4))
    model["codes"] = nn.Linear(4, 4, bias=False)
    model["codes"].weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.int8), requires_grad=False)
    model["tied"].weight = model["embedding"].weight
    before = {name: id(module) for name, module in model.named_modules()}
    with pytest.raises(ValueError, match=words):
        split_projections(model, {"qkv": SIZES, **layers} if "qkv" not in layers else layers)
    assert {name: id(module) for name, module in model.named_modules()} == before
    assert model["qkv"].weight is not None


@pytest.mark.parametrize("base", [False], indirect=True)
def test_refused_later(base):
    model = adapted(base)
    with pytest.raises(ValueError, match=r"qkv\.q is adapted already|the model is adapted already"):
        split_projections(model, {"qkv": SIZES})
    model = copy.deepcopy(base)
    split_projections(model, {"qkv": SIZES})
    with pytest.raises(ValueError, match=r"qkv: SplitLinear\(in_features=16, parts to be named: q=12"):
        apply_dash(model, DashConfig(target_modules=["qkv"]))
    with pytest.raises(ValueError, match=r"qkv\.q: train_bias=True"):
        apply_dash(model, DashConfig(**CONFIG, train_bias=True))
    with pytest.raises(ValueError, match=r"trainable_modules: qkv\.k is a part of a fused layer"):
        apply_dash(model, DashConfig(target_modules=["q"], trainable_modules=["qkv.k"]))
    with pytest.raises(ValueError, match="cannot be replaced"):
        model.qkv.q.weight = nn.Parameter(torch.zeros(12, K))
    apply_dash(model, DashConfig(target_modules=r"qkv.*"))
    assert list(dash_layers(model)) == ["qkv.q", "qkv.k", "qkv.v"]
    kept = model.qkv.weight
    model.qkv.weight = nn.Parameter(kept.to(torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match=r"qkv \(q, k, v\): member 0: weight is torch\.int8"):
        model(x_of())
    model.qkv.weight = nn.Parameter(kept.detach().as_subclass(Codes), requires_grad=False)
    with pytest.raises(ValueError, match="qkv: its weight was quantised"):
        model(x_of())


@pytest.mark.parametrize("base", [False], indirect=True)
def test_prelaunch_from_a_cache_and_warming(base, tmp_path):
    model = filled(adapted(base))
    reports = {}
    for cache in (None, loradash.SpectralCache(tmp_path)):
        for layer in dash_layers(model).values():
            layer.launched.fill_(False)
        reports[cache is None] = prelaunch(model, cache=cache)
    assert [r.name for r in reports[True]] == ["qkv.q", "qkv.k", "qkv.v"]
    for a, b in zip(*reports.values(), strict=True):
        torch.testing.assert_close(a.sigma, b.sigma, rtol=1e-3, atol=1e-4)
    assert {run.name for run in loradash.warm_up(model, rows=[8], progress=False)} == {"qkv.q", "qkv.k", "qkv.v"}
