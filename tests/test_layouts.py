"""Strides, dimensions, dtypes and modes of the inputs."""

from __future__ import annotations

import pytest
import torch

from loradash_kernels import dash_linear, low_rank_update
from loradash_kernels.testing import make_case


def call(case, x=None, **changes):
    t = {**case.tensors, **changes}
    x = t.pop("x") if x is None else x
    t.pop("x", None)
    weight, bias = t.pop("weight"), t.pop("bias")
    return dash_linear(x, weight, bias, scaling=case.scaling, **t)


@pytest.fixture(params=[torch.float32, torch.bfloat16])
def case(request):
    return make_case(24, 40, 56, 4, 3, request.param)


def test_dimensions(case, backend):
    expected = call(case, backend=backend)
    assert torch.equal(call(case, case.x.view(2, 3, 4, 40), backend=backend), expected.view(2, 3, 4, 56))
    torch.testing.assert_close(call(case, case.x[0], backend=backend), expected[0], rtol=2e-2, atol=2e-2)
    assert call(case, case.x[:0].view(3, 0, 40), backend=backend).shape == (3, 0, 56)


def test_strided_x(case, backend):
    expected = call(case, backend=backend)
    wide = torch.zeros(24, 100, dtype=case.x.dtype)
    wide[:, 7:47] = case.x
    assert torch.equal(call(case, wide[:, 7:47], backend=backend), expected)
    assert torch.equal(call(case, case.x.t().contiguous().t(), backend=backend), expected)
    permuted = case.x.view(2, 12, 40).transpose(0, 1)
    assert torch.equal(call(case, permuted, backend=backend), expected.view(2, 12, 56).transpose(0, 1))
    assert torch.equal(call(case, case.x[:1].expand(24, 40), backend=backend)[5], expected[0])


def test_strided_weight(case, backend):
    expected = call(case, backend=backend)
    weight = case.tensors["weight"]
    assert torch.equal(call(case, weight=weight.t().contiguous().t(), backend=backend), expected)
    sliced = torch.zeros(56, 80, dtype=weight.dtype)
    sliced[:, ::2] = weight
    assert torch.equal(call(case, weight=sliced[:, ::2], backend=backend), expected)


@pytest.mark.parametrize(
    "make", [lambda dy: dy.t().contiguous().t(), lambda dy: dy[:1].expand(24, 56), lambda dy: dy[:1, :1].expand(24, 56)]
)
def test_strided_dy(case, backend, make):
    grads = []
    for dy in (make(case.dy), make(case.dy).contiguous()):
        x = case.x.clone().requires_grad_()
        a = case.tensors["lora_a"].clone().requires_grad_()
        call(case, x, lora_a=a, backend=backend).backward(dy)
        grads.append((x.grad, a.grad))
    assert all(torch.equal(p, q) for p, q in zip(*grads, strict=True))


def test_eval_and_p_zero_draw_nothing(case):
    before = torch.get_rng_state()
    call(case, dropout_p=0.5, training=False)
    call(case, dropout_p=0.0)
    assert torch.equal(before, torch.get_rng_state())


def test_autocast(backend):
    case = make_case(16, 32, 48, bias=True)
    x, a = case.x.clone().requires_grad_(), case.tensors["lora_a"].clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = call(case, x, lora_a=a, backend=backend)
    assert y.dtype == torch.bfloat16
    y.float().square().sum().backward()
    assert x.grad.dtype == a.grad.dtype == torch.float32
    torch.testing.assert_close(y.float(), call(case, backend=backend), rtol=0.05, atol=0.1)


def test_only_needed_gradients(case):
    t = case.tensors
    b = t["lora_b"].clone().requires_grad_()
    y = call(case, lora_b=b)
    assert next(n for n, _ in y.grad_fn.next_functions if n is not None).variable is b
    y.sum().backward()
    assert b.grad is not None
    assert not call(case).requires_grad


def test_inputs_are_not_written(case):
    before = {n: None if v is None else v.clone() for n, v in case.tensors.items()}
    y = torch.randn(24, 56).to(case.x.dtype)
    kept = y.clone()
    t = {n: v for n, v in case.tensors.items() if n not in ("x", "weight", "bias")}
    low_rank_update(y, case.x.clone().requires_grad_(), dropout_p=0.3, **t).sum().backward()
    call(case, dropout_p=0.3)
    assert torch.equal(y, kept)
    assert all(v is None or torch.equal(v, case.tensors[n]) for n, v in before.items())


def test_vectors_with_strides(backend):
    """bias and dash_sigma that are columns of something wider."""
    case = make_case(20, 24, 28, 4, 3)
    wanted = call(case, backend=backend)
    for name in ("bias", "dash_sigma"):
        case.tensors[name] = torch.stack((case.tensors[name], torch.full_like(case.tensors[name], 9.0)), 1)[:, 0]
        assert not case.tensors[name].is_contiguous()
    assert torch.equal(call(case, backend=backend), wanted)
