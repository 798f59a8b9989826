"""Strides, dimensions, dtypes and modes of the inputs."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from support.matrix import refused
from support.promises import check_same

from loradash_kernels import dash_linear, low_rank_update
from loradash_kernels.testing import Case, check_error_rule, make_case, run


def call(case, x=None, **changes):
    t = {**case.tensors, **changes}
    x = t.pop("x") if x is None else x
    t.pop("x", None)
    weight, bias = t.pop("weight"), t.pop("bias")
    return dash_linear(x, weight, bias, scaling=case.scaling, **t)


@pytest.fixture(params=[torch.float32, torch.bfloat16])
def case(request, device):
    return make_case(24, 40, 56, 4, 3, request.param, device=device)


def check_output(case, backend, y):
    """y (M, N) by the error rule, with the backend's own gradients."""
    check_error_rule(case, {**run(case, backend), "y": y})


def test_dimensions(case, backend):
    if refused(case, backend):
        return
    check_output(case, backend, call(case, case.x.view(2, 3, 4, 40), backend=backend).view(24, 56))
    rows = torch.stack([call(case, row, backend=backend) for row in case.x])
    check_output(case, backend, rows)
    permuted = call(case, case.x.view(2, 12, 40).transpose(0, 1), backend=backend)
    check_output(case, backend, permuted.transpose(0, 1).reshape(24, 56))
    assert call(case, case.x[:0].view(3, 0, 40), backend=backend).shape == (3, 0, 56)


def sliced(t):
    """Columns of a wider matrix, that begin at an odd one, among NaN."""
    wide = torch.full((t.shape[0], t.shape[1] + 60), torch.nan, dtype=t.dtype, device=t.device)
    wide[:, 7 : 7 + t.shape[1]] = t
    return wide[:, 7 : 7 + t.shape[1]]


def every_second(t):
    wide = torch.full((t.shape[0], 2 * t.shape[1]), torch.nan, dtype=t.dtype, device=t.device)
    wide[:, ::2] = t
    return wide[:, ::2]


def transposed(t):
    return t.t().contiguous().t()


def one_row(t):
    return t[:1].expand(t.shape)


def one_number(t):
    return t[:1, :1].expand(t.shape)


def with_tensor(case: Case, name: str, t: torch.Tensor) -> Case:
    return replace(case, dy=t) if name == "dy" else replace(case, tensors={**case.tensors, name: t})


@pytest.mark.parametrize("layout", [sliced, every_second, transposed, one_row, one_number])
@pytest.mark.parametrize("name", ["x", "weight", "dy", "lora_a", "lora_b", "dash_u", "dash_vt"])
def test_strides(case, backend, name, layout):
    if refused(case, backend):
        return
    t = layout(case.dy if name == "dy" else case.tensors[name])
    moved, plain = with_tensor(case, name, t), with_tensor(case, name, t.contiguous())
    check_same(plain, backend, run(plain, backend), run(moved, backend), moved=True)


@pytest.mark.parametrize("name", ["bias", "dash_sigma"])
def test_strides_of_vectors(case, backend, name):
    """A column of something wider."""
    if refused(case, backend):
        return
    t = case.tensors[name]
    moved = with_tensor(case, name, torch.stack((t, torch.full_like(t, torch.nan)), 1)[:, 0])
    assert not moved.tensors[name].is_contiguous()
    check_same(case, backend, run(case, backend), run(moved, backend), moved=True)


def test_eval_and_p_zero_draw_nothing(case):
    state = torch.get_rng_state if case.x.is_cpu else torch.cuda.get_rng_state
    before = state()
    call(case, dropout_p=0.5, training=False)
    call(case, dropout_p=0.0)
    assert torch.equal(before, state())
    call(case, dropout_p=0.5)
    assert not torch.equal(before, state())


def test_autocast(backend, device):
    """As if x, weight and bias were cast; gradients come in the dtypes of the leaves."""
    case = make_case(16, 32, 48, bias=True, device=device)
    x, a = case.x.clone().requires_grad_(), case.tensors["lora_a"].clone().requires_grad_()
    with torch.autocast(device.type, torch.bfloat16):
        y = call(case, x, lora_a=a, backend=backend)
    assert y.dtype == torch.bfloat16
    y.float().square().sum().backward()
    assert x.grad.dtype == a.grad.dtype == torch.float32
    cast = {n: t.bfloat16() if n in ("x", "weight", "bias") else t for n, t in case.tensors.items()}
    check_output(replace(case, tensors=cast, dy=case.dy.bfloat16()), backend, y.detach())


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
    y = torch.randn(24, 56).to(case.x)
    kept = y.clone()
    t = {n: v for n, v in case.tensors.items() if n not in ("x", "weight", "bias")}
    low_rank_update(y, case.x.clone().requires_grad_(), dropout_p=0.3, **t).sum().backward()
    call(case, dropout_p=0.3)
    assert torch.equal(y, kept)
    assert all(v is None or torch.equal(v, case.tensors[n]) for n, v in before.items())
