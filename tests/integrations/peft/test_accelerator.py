"""Accelerated PEFT layers: their outputs and gradients against the formula in float64 and against PEFT's own forward."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

peft = pytest.importorskip("peft")

from loradash.integrations.peft import (  # noqa: E402
    DashLoraConfig,
    accelerate,
    accelerated,
    accelerated_layer,
    decelerate,
)
from support.accelerated import SCALING, Problem, adapted, gap  # noqa: E402

from loradash_kernels.backends import extension  # noqa: E402
from loradash_kernels.packed_weights import invalidate_packed_weights, packed_weight_bytes  # noqa: E402
from loradash_kernels.testing import error_ratios, formula  # noqa: E402

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
DTYPES = [(F32, F32), (BF16, F32), (BF16, BF16), (F16, F32), (F32, BF16)]
OPTIONS = {
    "plain": {},
    "without bias": {"bias": False},
    "Conv1D": {"conv1d": True},
    "rsLoRA": {"rslora": True},
    "lora_bias": {"lora_bias": True},
    "lora_bias, no bias": {"lora_bias": True, "bias": False},
    "a bias that trains": {"train_bias": True},
    "two adapters": {"scalings": (SCALING, SCALING)},
    "three scalings": {"scalings": (SCALING, 0.5, 8.0)},
    "two adapters of lora_bias on Conv1D": {"scalings": (SCALING, 0.5), "lora_bias": True, "conv1d": True},
}


@pytest.fixture(autouse=True)
def with_kernels(monkeypatch):
    """Without the compiled part the accelerator gives way in every call; the formulas are tested all the same."""
    monkeypatch.setattr(accelerated_layer, "without_kernels", lambda *call: None)
    torch.manual_seed(0)


WAYS = [("fused", dtypes) for dtypes in DTYPES] + [("beside the base", dtypes) for dtypes in DTYPES[:2]]


@pytest.mark.parametrize(("way", "dtypes"), WAYS)
@pytest.mark.parametrize("option", OPTIONS)
def test_outputs_and_gradients(option, dtypes, way):
    problem = Problem(*dtypes, **OPTIONS[option])
    if way != "fused":
        problem.layer.base_layer.register_forward_hook(lambda *call: None)
    theirs = problem.run()
    report = accelerate(problem.model)
    ours = problem.run()
    assert [(w.how, n) for w, n in report.calls.items()] == [(way, 1)]
    assert gap(ours, theirs) < (1e-5 if dtypes == (F32, F32) else 2e-2)
    # The formula has a gradient of every bias, frozen or not, and that of a bias of B in its own dtype is compared above.
    exact = formula(problem.case, torch.float64)
    judged = {n: t for n, t in ours.items() if n != "bias" or t.dtype in (dtypes[0], F32)}
    if dtypes == (F32, BF16):
        judged.pop("bias", None)
    ratios = error_ratios(problem.case, {**exact, **judged})
    # B's bias is rounded into the base layer's output before the low-rank terms are.
    allowed = 2 if way != "fused" and OPTIONS[option].get("lora_bias") else 1
    assert max(float(r.max()) for r in ratios.values()) <= allowed


@pytest.mark.parametrize("shape", [(40,), (3, 40), (2, 3, 40), (0, 40), (2, 0, 40)])
@pytest.mark.parametrize("conv1d", [False, True])
def test_any_leading_dimensions(shape, conv1d):
    problem = Problem(F32, F32, conv1d=conv1d, lora_bias=True)
    x = torch.randn(shape)
    wanted = problem.layer(x)
    with accelerated(problem.model) as report:
        y = problem.layer(x)
        y.sum().backward()
    assert report.fused == 1 and y.shape == wanted.shape
    torch.testing.assert_close(y, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("weight", [F32, BF16])
@pytest.mark.parametrize("hooked", [False, True])
def test_autocast(weight, hooked):
    """What autocast does to PEFT's layer it does here: the dtype of the output, of the gradients, the size of the error."""
    problem = Problem(weight, F32, lora_bias=True, train_bias=True)
    if hooked:
        problem.layer.base_layer.register_forward_hook(lambda *call: None)
    runs = []
    for on in (False, True):
        report = accelerate(problem.model) if on else None
        for dtype in (F32, BF16):
            x = problem.case.x.to(dtype, copy=True).requires_grad_()
            problem.model.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                y = problem.layer(x)
            y.float().square().sum().backward()
            grads = {n: p.grad for n, p in problem.model.named_parameters() if p.requires_grad}
            runs.append({"y": y.detach(), "x": x.grad, **grads})
    assert sum(n for way, n in report.calls.items() if way.how == ("beside the base" if hooked else "fused")) == 2
    assert runs[0]["y"].dtype is BF16
    assert gap(runs[2], runs[0]) < 3e-2 and gap(runs[3], runs[1]) < 3e-2


def identity(p, **settings):
    """W = 0, A = B = 1: the output is scaling times what dropout leaves of the input."""
    net = nn.Sequential(nn.Linear(64, 64))
    model = adapted(net, lora_dropout=p, r=64, lora_alpha=128, **settings)
    layer = model.base_model.model[0]
    for t in (layer.base_layer.weight, layer.base_layer.bias):
        t.data.zero_()
    for part in (layer.lora_A, layer.lora_B):
        part["default"].weight.data.copy_(torch.eye(64))
    return model, layer


@pytest.mark.parametrize("p", [0.05, 0.5])
@pytest.mark.parametrize("way", ["fused", "beside the base"])
def test_dropout(p, way):
    """In training: the share that is dropped, mean and variance of what is left, forward and backward, and a mask of its own
    in every call. In evaluation, and where only the dropout is in evaluation: none."""
    model, layer = identity(p)
    if way != "fused":
        layer.base_layer.register_forward_hook(lambda *call: None)
    report = accelerate(model)
    x = torch.ones(2048, 64, requires_grad=True)
    y = layer(x)
    left = (y / 2).detach().double()
    assert abs(float((left == 0).double().mean()) - p) < 5 * (p * (1 - p) / x.numel()) ** 0.5
    assert abs(float(left.mean()) - 1) < 5 * (p / (1 - p) / x.numel()) ** 0.5
    assert float(left.var()) == pytest.approx(p / (1 - p), rel=0.05)
    assert left[left != 0].unique().tolist() == pytest.approx([1 / (1 - p)], rel=1e-4)
    y.sum().backward()
    assert torch.equal(x.grad, y), "backward drops what forward dropped"
    assert not torch.equal(layer(x), y)
    layer.lora_dropout.eval()
    assert torch.equal(layer(x), 2 * x)
    layer.lora_dropout.train()
    assert not torch.equal(layer(x), 2 * x)
    model.eval()
    assert torch.equal(layer(x), 2 * x)
    assert [(w.how, n) for w, n in report.calls.items()] == [(way, 5)]


def test_adapters_of_several_dropouts():
    """Each adapter has its own: with 0, 0.25 and 0.5 the outputs are sums of the three."""
    model, layer = identity(0.0)
    for name, p in (("second", 0.25), ("third", 0.5)):
        model.add_adapter(name, peft.LoraConfig(r=64, lora_alpha=64, target_modules=["0"], lora_dropout=p))
        for part in (layer.lora_A, layer.lora_B):
            part[name].weight.data.copy_(torch.eye(64))
    model.base_model.set_adapter(["default", "second", "third"])
    report = accelerate(model)
    x = torch.ones(512, 64)
    values, counts = layer(x).round(decimals=4).unique(return_counts=True)
    combinations = sorted(2 + a / 0.75 + b / 0.5 for a, b in itertools.product((0, 1), (0, 1)))
    torch.testing.assert_close(values, torch.tensor(combinations), rtol=0, atol=1e-3)
    shares = counts / counts.sum()
    torch.testing.assert_close(shares, torch.tensor([0.125, 0.375, 0.125, 0.375]), rtol=0, atol=0.02)
    model.eval()
    assert torch.equal(layer(x), 4 * x)
    assert report.fused == 2


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant):
    """The recomputed forward draws the first one's mask."""
    model, layer = identity(0.5)
    report = accelerate(model)
    x = torch.ones(64, 64, requires_grad=True)
    y = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=reentrant)
    y.sum().backward()
    assert torch.equal(x.grad, y)
    assert report.fused == 2


@pytest.mark.parametrize("size", [2e-6, 1e-5, 3e-5, 1e-4])
def test_a_merged_weight_is_read_anew(size):
    """PEFT merges by `weight.data +=`. A second adapter, accelerated from the first call on, reads the new weight bit for bit:
    rows of the identity pick it, and a B of zeros adds nothing."""
    n = 64
    invalidate_packed_weights()
    for trial in range(10):
        torch.manual_seed(trial)
        net = nn.Sequential(nn.Linear(n, n, bias=False)).to(BF16)
        net[0].weight.data.mul_(100 * size)
        x, dy = (torch.eye(n, dtype=BF16).repeat(4, 1) for _ in range(2))
        for _ in range(3):
            model = adapted(net, r=8, init_lora_weights=True)
            layer = model.base_model.model[0]
            with accelerated(model) as report:
                for _ in range(3):
                    rows = x.clone().requires_grad_()
                    y = layer(rows)
                    y.backward(dy)
                    before = layer.base_layer.weight.detach().clone()
                    assert torch.equal(y[:n], before.t()) and torch.equal(rows.grad[:n], before)
                assert report.fused == 3
                a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
                nn.init.normal_(b, std=size * 3**0.5 / (layer.scaling["default"] * 8**0.5))
                nn.init.normal_(a, std=1.0)
                if extension.is_compiled() and extension.compiled().min_base_rows(1):
                    assert packed_weight_bytes() > 0
                net = model.merge_and_unload()
                assert not torch.equal(net[0].weight, before)


def test_layers_of_loradash_are_on_the_operator_already(recwarn):
    x = torch.randn(5, 16)
    model = peft.get_peft_model(
        nn.Sequential(nn.Linear(16, 12)), DashLoraConfig(r=4, directions=2, target_modules=["0"])
    )
    layer, wanted = model.base_model.model[0], model(x)
    kind, report = type(layer), accelerate(model)
    assert not recwarn.list and type(layer) is kind and torch.equal(model(x), wanted)
    assert "LORADASH: on the operator already" in str(report)
    assert [entry.changed for entry in report.layers.values()] == [False] and decelerate(model) == 0


def test_flops_are_those_of_peft():
    """PyTorch's counter sets hooks on all modules."""
    model, found = adapted(nn.Sequential(nn.Linear(16, 12), nn.Linear(12, 8))), []
    for on in (False, True):
        report = accelerate(model) if on else None
        with FlopCounterMode(display=False) as counter:
            model(torch.randn(5, 16)).sum().backward()
        found.append(counter.get_total_flops())
    assert found[0] == found[1] > 0
    assert {way.why for way in report.calls} == {"hooks on all modules"}


def test_a_class_made_over_an_accelerated_layer():
    """As fully_shard and parametrize make them: given back it computes PEFT's way, accelerated again it is fused again."""
    model, x = adapted(nn.Sequential(nn.Linear(16, 12))), torch.randn(5, 16)
    layer, wanted, report = model.base_model.model[0], model(x), accelerate(model)
    layer.__class__ = type("Sharded", (type(layer),), {})
    report.undo()
    assert torch.equal(model(x), wanted) and report.fused == 0 and decelerate(model) == 0
    again = accelerate(model)
    torch.testing.assert_close(model(x), wanted, rtol=1e-5, atol=1e-5)
    assert again.fused == 1 and decelerate(model) == 1
