"""Outputs and all gradients against float64, by the error rule."""

from __future__ import annotations

import pytest
import torch
from support.devices import plain_dtype
from support.matrix import checked, refused
from support.shapes import DTYPES, SHAPES

from loradash_kernels.testing import check_error_rule, make_case, run


@pytest.mark.parametrize("dropout_p", [0.0, 0.05, 0.9])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_shapes(backend, device, shape, dtype, dropout_p):
    checked(make_case(*shape, dtype, adapter_dtype=torch.float32, dropout_p=dropout_p, device=device), backend)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(40, 48, 56, 4, 3), (129, 66, 35, 8, 8)])
def test_low_rank_update(backend, device, shape, dtype):
    case = make_case(*shape, dtype, adapter_dtype=torch.float32, dropout_p=0.1, device=device)
    checked(case, backend, base=False)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("r", "s"), [(4, 0), (1, 8), (64, 1)])
@pytest.mark.parametrize("bias", [False, True])
def test_ranks(backend, device, r, s, bias, dtype):
    checked(make_case(50, 70, 90, r, s, dtype, bias=bias, device=device), backend)


def test_rank_zero(backend, device):
    """r = 0 leaves the dash term alone; r = s = 0 leaves the base layer."""
    for s in (3, 0):
        checked(make_case(20, 24, 28, 0, s, plain_dtype(backend), dropout_p=0.2, device=device), backend)


@pytest.mark.parametrize("dtype", DTYPES)
def test_adapters_of_the_dtype_of_x(backend, device, dtype):
    ours = checked(make_case(64, 64, 64, 8, 4, dtype, dropout_p=0.1, device=device), backend)
    assert ours is None or ours["lora_a"].dtype == ours["dash_sigma"].dtype == dtype


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES[:2])
@pytest.mark.parametrize("shape", [(256, 1024, 1024), (1030, 768, 800), (65, 2080, 2048)])
def test_large(shape, dtype):
    case = make_case(*shape, 16, 8, dtype, adapter_dtype=torch.float32, dropout_p=0.05)
    check_error_rule(case, run(case))


@pytest.mark.parametrize("m", [0, 4])
@pytest.mark.parametrize("k", [0, 8])
@pytest.mark.parametrize("n", [0, 8])
@pytest.mark.parametrize("dropout_p", [0.0, 0.2])
def test_empty(backend, device, m, k, n, dropout_p):
    checked(make_case(m, k, n, 2, 2, plain_dtype(backend), dropout_p=dropout_p, device=device), backend)


def test_float64_takes_the_reference(device):
    case = make_case(9, 10, 11, dtype=torch.float64, dropout_p=0.3, device=device)
    check_error_rule(case, run(case))


def test_float64_is_refused_by_kernels(backend, device):
    """Each of them names the dtype; plain PyTorch takes it."""
    case = make_case(9, 10, 11, dtype=torch.float64, device=device)
    assert refused(case, backend) == (backend != "reference")


def test_gradcheck_of_the_reference():
    from loradash_kernels import dash_linear

    case = make_case(4, 5, 6, 2, 2, torch.float64)
    names = ("x", "bias", "lora_a", "lora_b", "dash_sigma")
    leaves = [case.tensors[n].clone().requires_grad_() for n in names]

    def f(x, bias, a, b, sigma):
        t = case.tensors
        return dash_linear(
            x,
            t["weight"],
            bias,
            lora_a=a,
            lora_b=b,
            dash_u=t["dash_u"],
            dash_vt=t["dash_vt"],
            dash_sigma=sigma,
            scaling=0.7,
        )

    assert torch.autograd.gradcheck(f, leaves)


def test_nan_and_infinity_pass_through(backend, device):
    """A NaN in x poisons its own row of y and nothing else; one in W its own column."""
    case = make_case(40, 64, 64, dtype=plain_dtype(backend), dropout_p=0.0, device=device)
    case.x[3, 5] = float("nan")
    case.tensors["weight"][7, 2] = float("inf")
    y = run(case, backend)["y"]
    bad = ~torch.isfinite(y)
    wanted = torch.zeros_like(bad)
    wanted[3], wanted[:, 7] = True, True
    assert torch.equal(bad, wanted)
