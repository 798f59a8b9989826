"""The operator in other people's programs: torch.func, forward mode, tracing, export, FLOP counters, meta tensors."""

from __future__ import annotations

import itertools
import subprocess
import sys
from typing import Any

import loradash
import pytest
import torch
from support.devices import plain_dtype
from support.matrix import close
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vmap
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

from loradash_kernels import dash_linear, low_rank_update
from loradash_kernels.testing import make_case

M, K, N = 5, 8, 6
TRAINED = ("x", "lora_a", "lora_b", "dash_sigma", "bias")


def fused(t: dict[str, Any], **options: Any) -> torch.Tensor:
    t = dict(t)
    return dash_linear(t.pop("x"), t.pop("weight"), t.pop("bias"), scaling=2.0, **t, **options)


def update(t: dict[str, Any], **options: Any) -> torch.Tensor:
    t = dict(t)
    x = t.pop("x")
    return low_rank_update(F.linear(x, t.pop("weight"), t.pop("bias")), x, scaling=2.0, **t, **options)


def formula(t: dict[str, Any]) -> torch.Tensor:
    """The layer as its definition says."""
    low = 2.0 * (t["x"] @ t["lora_a"].T @ t["lora_b"].T)
    return (
        F.linear(t["x"], t["weight"], t["bias"]) + low + ((t["x"] @ t["dash_vt"].T) * t["dash_sigma"]) @ t["dash_u"].T
    )


@pytest.fixture
def tensors():
    return dict(make_case(M, K, N, 2, 3, torch.float64).tensors)


def of(function, tensors, names=TRAINED):
    """The function of the named tensors alone."""
    return lambda values: function({**tensors, **values}), {name: tensors[name] for name in names}


def loss(function):
    return lambda values: function(values).square().sum()


def rows(function):
    return lambda values: vmap(lambda x: function({**values, "x": x}))(values["x"])


def tangents(values):
    return {name: torch.linspace(-1, 1, t.numel(), dtype=t.dtype).view(t.shape) for name, t in values.items()}


TRANSFORMS = {
    "grad": lambda f, v: grad(loss(f))(v),
    "jacrev": lambda f, v: jacrev(f)(v),
    "jacfwd": lambda f, v: jacfwd(f)(v),
    "hessian": lambda f, v: hessian(loss(f))(v),
    "jvp": lambda f, v: jvp(f, (v,), (tangents(v),)),
    "grad of vmap": lambda f, v: grad(loss(rows(f)))(v),
    "vmap of grad": lambda f, v: vmap(lambda x: grad(loss(f))({**v, "x": x}))(v["x"]),
    "vmap over adapters": lambda f, v: vmap(lambda a: f({**v, "lora_a": a}))(torch.stack([v["lora_a"], -v["lora_a"]])),
}


@pytest.mark.parametrize("function", [fused, update])
@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms_give_the_derivatives_of_the_formula(tensors, function, name):
    ours, theirs = (TRANSFORMS[name](*of(f, tensors)) for f in (function, formula))
    torch.testing.assert_close(tree_leaves(ours), tree_leaves(theirs))


@pytest.mark.parametrize("function", [fused, update])
def test_dual_numbers(tensors, function):
    def derivative(f):
        with forward_ad.dual_level():
            duals = {n: forward_ad.make_dual(t, torch.ones_like(t)) for n, t in tensors.items() if n in TRAINED}
            return tuple(forward_ad.unpack_dual(f({**tensors, **duals})))

    torch.testing.assert_close(derivative(function), derivative(formula))


@pytest.mark.parametrize("function", [fused, update])
def test_what_transforms_do_not_support_is_said(tensors, function):
    with pytest.raises(RuntimeError, match=r"loradash: dropout is not supported under torch\.func"):
        grad(loss(lambda v: function({**tensors, **v}, dropout_p=0.5)))({"x": tensors["x"]})
    with pytest.raises(RuntimeError, match=r"loradash: backend='reference' is not supported under torch\.func"):
        vmap(lambda x: function({**tensors, "x": x}, backend="reference"))(tensors["x"])
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match="loradash: dropout is not supported"):
        function(tensors, dropout_p=0.5)
    # Not active in evaluation, so nothing is in the way.
    torch.testing.assert_close(
        vmap(lambda x: function({**tensors, "x": x}, dropout_p=0.5, training=False))(tensors["x"]), formula(tensors)
    )


def test_per_sample_gradients_of_a_module():
    layer = loradash.DashLinear(K, N, config=loradash.DashConfig(r=2, directions=2)).double()
    torch.nn.init.normal_(layer.lora_b)
    values = {n: p.detach() for n, p in layer.named_parameters() if p.requires_grad}
    x = torch.randn(M, K, dtype=torch.float64)
    found = vmap(grad(lambda v, row: functional_call(layer, v, (row,)).square().sum()), (None, 0))(values, x)
    for index, row in enumerate(x):
        layer.zero_grad()
        layer(row).square().sum().backward()
        for name in values:
            torch.testing.assert_close(found[name][index], layer.get_parameter(name).grad)


# PyTorch calls the operator once for each gradient, and says that this is slow.
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_batched_gradients_of_an_eager_call(tensors, backend, device):
    """The forward pass ran a kernel; its backward pass is asked for many gradients at once."""
    t = {n: v.to(device, plain_dtype(backend)) for n, v in tensors.items()}
    x = t["x"].clone().requires_grad_()
    y = fused({**t, "x": x}, backend=backend)
    basis = torch.eye(M * N).to(y).view(M * N, M, N)
    one_by_one = torch.stack([torch.autograd.grad(y, x, dy, retain_graph=True)[0] for dy in basis])
    (at_once,) = torch.autograd.grad(y, x, basis, retain_graph=True, is_grads_batched=True)
    by_vmap = vmap(lambda dy: torch.autograd.grad(y, x, dy, retain_graph=True)[0])(basis)
    close(at_once, one_by_one)
    close(by_vmap, one_by_one)


def test_forward_mode_over_an_eager_call_is_refused(tensors):
    x = tensors["x"].clone().requires_grad_()
    y = fused({**tensors, "x": x})
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match=r"loradash: .* no forward-mode derivatives"):
        torch.autograd.grad(y, x, forward_ad.make_dual(torch.ones_like(y), torch.ones_like(y)))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["grad", "jvp", "grad of vmap"])
def test_compiled_transforms(tensors, name):
    torch._dynamo.reset()
    ours, values = of(fused, tensors)
    compiled = torch.compile(lambda v: TRANSFORMS[name](ours, v), fullgraph=True, backend="aot_eager")
    expected = TRANSFORMS[name](*of(formula, tensors))
    torch.testing.assert_close(tree_leaves(compiled(values)), tree_leaves(expected))


@pytest.mark.parametrize("name", ["weight", "dash_u", "dash_vt"])
def test_gradients_of_frozen_tensors_are_refused(tensors, name):
    asked = {**tensors, name: tensors[name].clone().requires_grad_()}
    functions = [fused] if name == "weight" else [fused, update]
    for function in functions:
        with pytest.raises(ValueError, match=f"{name} requires grad"):
            function(asked)
        torch._dynamo.reset()
        with pytest.raises(ValueError, match=f"{name} requires grad"):
            torch.compile(function, backend="eager")(asked)
    with pytest.raises(ValueError, match=f"{name} requires grad"):
        torch.ops.loradash.dash_linear(*asked.values(), None, 2.0, 0, None)
    if name != "weight":
        adapters = list(asked.values())[3:]
        with pytest.raises(ValueError, match=f"{name} requires grad"):
            torch.ops.loradash.low_rank_update(formula(tensors), tensors["x"], *adapters, None, 2.0, 0, None)


class Layer(torch.nn.Module):
    def __init__(self, tensors):
        super().__init__()
        self.lora_a = torch.nn.Parameter(tensors["lora_a"].clone())
        self.tensors = {n: t for n, t in tensors.items() if n not in ("x", "lora_a")}

    def forward(self, x):
        return fused({"x": x, "lora_a": self.lora_a, **self.tensors})


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_traced_and_exported_layers(tensors):
    layer, x = Layer(tensors), tensors["x"]
    traced = torch.jit.trace(layer, x)
    exported = torch.export.export(layer, (x,), dynamic_shapes=({0: torch.export.Dim("rows")},)).module()
    for f in (traced, exported):
        torch.testing.assert_close(f(x[:3]), layer(x[:3]))
        gradients = [torch.autograd.grad(g(x[:3]).square().sum(), g.parameters())[0] for g in (f, layer)]
        torch.testing.assert_close(*gradients)


def counted(function, tensors, wanted):
    """FLOPs of the forward and of the backward pass, by PyTorch's counter."""
    from torch.utils.flop_counter import FlopCounterMode

    leaves = {n: t.clone().requires_grad_(n in wanted) for n, t in tensors.items()}
    with FlopCounterMode(display=False) as counter:
        y = function(leaves)
        forward = counter.get_total_flops()
        if wanted:
            y.sum().backward()
    return forward, counter.get_total_flops() - forward


@pytest.mark.parametrize("function", [fused, update])
def test_flops_are_those_of_the_formula(tensors, function):
    for size in range(len(TRAINED) + 1):
        for wanted in itertools.combinations(TRAINED, size):
            assert counted(function, tensors, wanted) == counted(formula, tensors, wanted), wanted


def test_flops_without_gradients(tensors):
    with torch.no_grad():
        assert counted(fused, tensors, ())[0] == 2 * M * (K * N + 5 * (K + N))


@pytest.mark.slow
def test_flop_counter_imported_before_or_after():
    """After: nothing of ours stays in the import system. Before: as if this package were imported again, with a registry without
    its formulas."""
    code = (
        "import sys, torch, loradash_kernels as lk\n"
        "assert 'torch.utils.flop_counter' not in sys.modules\n"
        "from torch.utils import flop_counter\n"
        "assert not any(type(f).__module__.startswith('loradash') for f in sys.meta_path)\n"
        "z = torch.zeros\n"
        "def count():\n"
        "    with flop_counter.FlopCounterMode(display=False) as c:\n"
        "        lk.dash_linear(z(2, 3), z(4, 3), lora_a=z(1, 3), lora_b=z(4, 1))\n"
        "    return c.get_total_flops()\n"
        "counts = [count()]\n"
        "for op in [op for op in flop_counter.flop_registry if 'loradash' in str(op)]: del flop_counter.flop_registry[op]\n"
        "counts.append(count())\n"
        "lk.flops.register()\n"
        "print(*counts, count())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    expected = 2 * 2 * (3 * 4 + 3 + 4)
    assert [int(count) for count in done.stdout.split()] == [expected, 0, expected]


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_meta_layers(dropout):
    config = loradash.DashConfig(r=2, directions=2, dropout=dropout)
    with torch.device("meta"):
        layer, x = loradash.DashLinear(K, N, config=config), torch.randn(2, M, K, requires_grad=True)
    y = layer(x)
    assert y.is_meta and y.shape == (2, M, N)
    y.sum().backward()
    assert x.grad.is_meta and x.grad.shape == x.shape and layer.lora_b.grad.shape == (N, 2)
    with torch.no_grad():
        assert layer(x).is_meta
    # Autocast does not know the meta device.
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.float32


def test_fake_tensors():
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

    with FakeTensorMode():
        layer, x = loradash.DashLinear(K, N), torch.randn(M, K, requires_grad=True)
        y = layer(x)
        y.sum().backward()
    assert isinstance(y, FakeTensor) and x.grad.shape == x.shape
