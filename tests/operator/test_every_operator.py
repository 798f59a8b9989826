"""What every operator of the namespace must have, in one walk: a fake that agrees, gradients that are registered, a formula of
its FLOPs, and a refusal of what is no seed. A new operator that has no case here fails."""

from __future__ import annotations

import pytest
import torch
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import FlopCounterMode

from loradash_kernels.testing import make_case

ROWS, K, N, R, S = 6, 8, 10, 2, 3
ADAPTERS = ("lora_a", "lora_b", "dash_u", "dash_vt", "dash_sigma")
TRAINED = ("x", "bias", "lora_a", "lora_b", "dash_sigma")
SEED, THRESHOLD = torch.tensor([1, 2]), 1000
OPS = torch.ops.loradash


def tensors(rows, grad):
    found = make_case(rows, K, N, R, S).tensors
    return {name: t.clone().requires_grad_(grad and name in TRAINED) for name, t in found.items()}


def layer(rows, grad):
    """What a layer is called with, after x: its base, and the rest."""
    t = tensors(rows, grad)
    return t["x"], [t["weight"], t["bias"]], [*(t[name] for name in ADAPTERS), SEED, 2.0, THRESHOLD, None]


def linear(rows, grad=False):
    x, base, rest = layer(rows, grad)
    return [x, *base, *rest]


def update(rows, grad=False):
    x, _, rest = layer(rows, grad)
    return [torch.randn(rows, N, requires_grad=grad), x, *rest]


def project(rows, grad=False):
    x, _, rest = layer(rows, grad)
    return [x, *rest]


def after(whole):
    return lambda rows, grad=False: [OPS.project(*project(rows)), *whole(rows)]


def backward(rows, grad=False):
    x, (weight, _), rest = layer(rows, grad)
    _, p = OPS.dash_linear(*linear(rows))
    return [torch.randn(rows, N), x, weight, *rest[:5], p, *rest[5:-1], [True, False, True, True, False], None]


def experts(rows, grad=False):
    x, (weight, bias), rest = layer(rows, False)
    stacked = [torch.stack((t, -t, t)) for t in (weight, bias, *rest[:5])]
    for t in (x, stacked[1], stacked[2], stacked[3], stacked[6]):
        t.requires_grad_(grad)
    return [x, stacked[0], torch.tensor([rows - 2, rows - 2, rows]), *stacked[1:], *rest[5:]]


def experts_backward(rows, grad=False):
    x, weight, offsets, _, *rest = experts(rows)
    _, p = OPS.dash_experts(*experts(rows))
    options = [*rest[5:-1], [True, True, False, True, False], None]
    return [torch.randn(rows, N), x, weight, *rest[:5], offsets, p, *options]


def group(rows, grad=False):
    x, base, rest = layer(rows, grad)
    _, (weight, bias), (a, b, u, vt, sigma, *_) = layer(rows, grad)
    # A second member without bias and directions.
    second = [weight[:-1], bias.detach()[:0], a, b.detach()[:-1], u[:-1, :0], vt[:0], sigma.detach()[:0]]
    lists = [[first, other] for first, other in zip((*base, *rest[:5]), second, strict=True)]
    return [x, *lists, SEED, [2.0, 1.0], THRESHOLD, None]


def group_backward(rows, grad=False):
    x, weight, _, *rest = group(rows)
    _, p = OPS.dash_linear_group(*group(rows))
    dy = [torch.randn(rows, N), torch.randn(rows, N - 1)]
    needs = [True, True, False, True, True, False, True, True, False]
    return [dy, x, weight, *rest[:5], p, *rest[5:-1], needs, None]


def agreed(rows, grad=False):
    return [SEED, []]


CASES = {
    "dash_linear": linear,
    "low_rank_update": update,
    "dash_linear_backward": backward,
    "project": project,
    "dash_linear_after": after(linear),
    "low_rank_update_after": after(update),
    "dash_experts": experts,
    "dash_experts_backward": experts_backward,
    "dash_linear_group": group,
    "dash_linear_group_backward": group_backward,
    "agreed_seed": agreed,
}
DIFFERENTIABLE = ("dash_linear", "low_rank_update", "dash_experts", "dash_linear_group")
NO_PRODUCTS = ("agreed_seed",)
CHECKS = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")


def test_no_operator_is_forgotten():
    defined = {name.split("::")[1] for name in torch._C._dispatch_get_all_op_names() if name.startswith("loradash::")}
    assert {name.split(".")[0] for name in defined} == {*CASES}


@pytest.mark.parametrize("name", CASES)
def test_opcheck(name):
    op = getattr(OPS, name).default
    if name in DIFFERENTIABLE:
        torch.library.opcheck(op, CASES[name](ROWS, True), test_utils=(*CHECKS, "test_autograd_registration"))
    else:
        torch.library.opcheck(op, CASES[name](ROWS), test_utils=CHECKS)


@pytest.mark.parametrize("name", [name for name in CASES if name.endswith("_backward")])
def test_second_derivatives_are_refused(name):
    arguments = CASES[name](ROWS)
    arguments[1].requires_grad_()
    dx = getattr(OPS, name)(*arguments)[0]
    with pytest.raises(RuntimeError, match="second derivatives are not implemented"):
        dx.sum().backward()


def counted(name, rows):
    arguments = CASES[name](rows)
    with FlopCounterMode(display=False) as counter:
        getattr(OPS, name)(*arguments)
    return counter.get_total_flops()


@pytest.mark.parametrize("name", [name for name in CASES if name not in NO_PRODUCTS])
def test_flops_grow_with_the_rows(name):
    assert counted(name, 2 * ROWS) == 2 * counted(name, ROWS) > 0


@pytest.mark.parametrize("name", [name for name in CASES if name not in NO_PRODUCTS])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_what_is_no_seed_is_refused(name, device):
    wrong = [SEED.int() if argument is SEED else argument for argument in CASES[name](ROWS)]
    assert any(isinstance(argument, torch.Tensor) and argument.dtype == torch.int32 for argument in wrong)
    with pytest.raises(ValueError, match=r"seed has shape \(2,\), dtype torch\.int32"):
        getattr(OPS, name)(*tree_map_only(torch.Tensor, lambda t: t.to(device), wrong))
