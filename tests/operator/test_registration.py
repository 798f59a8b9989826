"""The operators as PyTorch sees them: schemas, fakes, autograd, compile."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
import torch._dynamo.testing
from torch._dynamo.compiled_autograd import _enable

from loradash_kernels import dash_linear
from loradash_kernels.testing import make_case

TESTS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


def arguments(case, grad, seed=None, threshold=0):
    names = ("x", "weight", "bias", "lora_a", "lora_b", "dash_u", "dash_vt", "dash_sigma")
    trainable = ("x", "bias", "lora_a", "lora_b", "dash_sigma")
    tensors = [case.tensors[n] for n in names]
    if grad:
        tensors = [
            t if t is None or n not in trainable else t.clone().requires_grad_()
            for n, t in zip(names, tensors, strict=True)
        ]
    return [*tensors, seed, 2.0, threshold, None]


@pytest.mark.parametrize(("s", "seed"), [(0, [1, 2]), (3, [1, 2, 5, 16])])
def test_opcheck_dash_linear(s, seed):
    """Without directions, and with the seed of a window; every operator is checked in test_every_operator."""
    args = arguments(make_case(6, 8, 10, 2, s), True, torch.tensor(seed), 1000)
    torch.library.opcheck(torch.ops.loradash.dash_linear.default, args, test_utils=TESTS)


@pytest.mark.parametrize("make", [lambda x: x[:, ::2], lambda x: x.t().contiguous().t()[:, :8], lambda x: x[::2, :8]])
def test_opcheck_layouts(make):
    case = make_case(6, 16, 10, 2, 2)
    for n in ("weight", "lora_a", "dash_vt"):
        case.tensors[n] = case.tensors[n][:, :8].contiguous()
    case.tensors["x"] = make(case.x)
    torch.library.opcheck(torch.ops.loradash.dash_linear.default, arguments(case, False), test_utils=TESTS)


def test_second_derivatives_raise():
    case = make_case(6, 8, 10)
    x, *rest = arguments(case, True)
    y = dash_linear(
        x, rest[0], rest[1], lora_a=rest[2], lora_b=rest[3], dash_u=rest[4], dash_vt=rest[5], dash_sigma=rest[6]
    )
    (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivatives are not implemented"):
        dx.sum().backward()


@pytest.mark.slow
def test_compile_fullgraph_dynamic_rows():
    """One graph for every M, with the same output and gradients as eager."""
    torch._dynamo.reset()
    case = make_case(12, 16, 20)
    t = dict(case.tensors)
    x, weight, bias = t.pop("x"), t.pop("weight"), t.pop("bias")
    leaves = {n: v.clone().requires_grad_(n in ("lora_a", "lora_b", "dash_sigma")) for n, v in t.items()}

    def layer(x):
        return torch.relu(dash_linear(x, weight, bias, **leaves))

    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    fast = torch.compile(layer, fullgraph=True, dynamic=True, backend=counter)
    frames = []
    for m in (12, 5, 9):
        results = []
        for f in (layer, fast):
            leaf = x[:m].clone().requires_grad_()
            for v in leaves.values():
                v.grad = None
            y = f(leaf)
            y.sum().backward()
            results.append([y.detach(), leaf.grad, *(leaves[n].grad for n in ("lora_a", "lora_b", "dash_sigma"))])
        for eager, compiled in zip(*results, strict=True):
            torch.testing.assert_close(compiled, eager)
        frames.append(counter.frame_count)
    assert frames[0] == frames[-1], "a new M compiled again"


@pytest.mark.slow
def test_compile_with_dropout_and_inductor():
    """A compiled training step draws one mask for forward and backward: dA is zero exactly where everything is dropped."""
    torch._dynamo.reset()
    case = make_case(8, 64, 16, s=0)
    t = case.tensors
    x, a = case.x.clone().requires_grad_(), t["lora_a"].clone().requires_grad_()

    @torch.compile(fullgraph=True)
    def layer(x, a):
        return dash_linear(x, t["weight"], t["bias"], lora_a=a, lora_b=t["lora_b"], dropout_p=0.5)

    y = layer(x, a)
    base = torch.nn.functional.linear(x, t["weight"], t["bias"])
    (low,) = torch.autograd.grad(y, x, torch.ones_like(y), retain_graph=True)
    (plain,) = torch.autograd.grad(base, x, torch.ones_like(base))
    # Sums of 16 terms of order 0.1 are rounded by less than this.
    kept = (low - plain).abs() > 1e-5
    expected = base + 2 * ((x * kept) @ a.t()) @ t["lora_b"].t()
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
    assert 0.3 < kept.double().mean() < 0.7


@pytest.mark.slow
def test_compiled_backward_of_an_eager_call():
    """Compiled autograd sees the operator in the backward pass, whatever the forward pass ran."""
    torch._dynamo.reset()
    case = make_case(6, 8, 10, 2, 2)
    names = ("lora_a", "lora_b", "dash_u", "dash_vt", "dash_sigma")
    results = []
    for compiled in (False, True):
        x, weight, bias, *adapters = arguments(case, True)[:8]
        y = dash_linear(x, weight, bias, **dict(zip(names, adapters, strict=True)))
        with _enable(torch.compile(backend="aot_eager")) if compiled else nullcontext():
            y.backward(case.dy)
        results.append([t.grad for t in (x, bias, adapters[0], adapters[1], adapters[4])])
    torch.testing.assert_close(*results)
