"""Mixed batches at the operator: every row is that of its own adapter, in outputs and gradients."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from loradash_kernels import dash_linear
from loradash_kernels.rows import Adapter, dash_linear_rows, group_rows, low_rank_update_rows
from loradash_kernels.testing import Case, check_error_rule

K, N = 40, 24
RANKS = ((4, 3), (2, 0), (6, 5))


def adapters(dtype=torch.float32):
    """Three of different rank, directions and scaling; the second has no directions."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape, grad=True):
        return (torch.randn(shape, generator=generator) / 4).to(dtype).requires_grad_(grad)

    return [
        Adapter(draw(r, K), draw(N, r), draw(N, s, grad=False), draw(s, K, grad=False), draw(s), scaling=0.5 + r)
        for r, s in RANKS
    ]


def base(dtype=torch.float32, *rows):
    generator = torch.Generator().manual_seed(1)
    x, weight, bias = (
        torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in ((*rows, K), (N, K), (N,))
    )
    return x.requires_grad_(), weight / 4, bias


def one_by_one(x, weight, bias, found, index, dy):
    """Output and gradients of every row alone, with its adapter."""
    rows = []
    for i, number in enumerate(index):
        row = x[i : i + 1]
        rows.append(
            F.linear(row, weight, bias)
            if number < 0 or found[number] is None
            else dash_linear(row, weight, bias, **found[number]._asdict())
        )
    y = torch.cat(rows)
    return y, gradients(y, x, found, dy)


def gradients(y, x, found, dy):
    leaves = [x, *(t for a in found if a is not None for t in (a.lora_a, a.lora_b, a.dash_sigma))]
    return torch.autograd.grad(y, leaves, dy, allow_unused=True, materialize_grads=True)


@pytest.mark.parametrize(
    "index", [[0, 1, 2, 1, -1, 0], [2, 2, 0, 0, 1, 1], [1] * 6, [-1] * 6, [-1, 0, 0, 0, 2, 2], [2, -1, 2, -1, 2, -1]]
)
@pytest.mark.parametrize("shape", [(6,), (6, 5), (6, 2, 3), (6, 100)], ids=str)
def test_every_row_has_its_own_adapter(index, shape):
    x, weight, bias = base(torch.float64, *shape)
    found = adapters(torch.float64)
    dy = torch.randn(*shape, N, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    expected, expected_gradients = one_by_one(x, weight, bias, found, index, dy)
    rows = group_rows(index)
    y = dash_linear_rows(x, weight, bias, adapters=found, rows=rows)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradients(y, x, found, dy), expected_gradients, rtol=1e-12, atol=1e-12)
    beside = low_rank_update_rows(F.linear(x, weight, bias), x, adapters=found, rows=rows)
    torch.testing.assert_close(beside, expected, rtol=1e-12, atol=1e-12)
    assert not torch.equal(y, F.linear(x, weight, bias)) or set(index) == {-1}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_rows_of_an_adapter_obey_the_error_rule(dtype):
    """Each adapter's rows, judged as a case of their own."""
    index = [0, 2, 0, 2, 2, 0]
    x, weight, _ = base(dtype, 6, 9)
    found = adapters()
    dy = torch.randn(6, 9, N, generator=torch.Generator().manual_seed(2)).to(dtype)
    y = dash_linear_rows(x, weight, adapters=found, rows=group_rows(index))
    dx, *others = gradients(y, x, found, dy)
    for number in (0, 2):
        mine = [i for i, n in enumerate(index) if n == number]
        tensors = {"x": x[mine].reshape(-1, K), "weight": weight, "bias": None, **found[number]._asdict()}
        options = {key: tensors.pop(key) for key in ("scaling", "dropout_p")}
        tensors = {name: None if t is None else t.detach() for name, t in tensors.items()}
        case = Case(tensors, dy[mine].reshape(-1, N), **options, seed=0)
        ours = dict(zip(("lora_a", "lora_b", "dash_sigma"), others[3 * number :], strict=False))
        ours |= {"x": dx[mine].reshape(-1, K), "y": y[mine].reshape(-1, N).detach()}
        check_error_rule(case, ours)


def test_dropout_draws_for_every_group_and_keeps_the_mean():
    torch.manual_seed(0)
    x, weight = torch.ones(4, 400, K), torch.zeros(N, K)
    found = [Adapter(torch.ones(1, K), torch.ones(N, 1), dropout_p=p) for p in (0.5, 0.0)]
    rows = group_rows([0, 1, 0, -1])
    y = dash_linear_rows(x, weight, adapters=found, rows=rows)
    assert torch.equal(y[1], torch.full_like(y[1], K)) and not y[3].any()
    # P is the sum of K elements, each 0 or 2: its mean is K, its deviation sqrt(K).
    for row in (0, 2):
        assert abs(float(y[row, :, 0].mean()) - K) < 5 * (K / 400) ** 0.5
        assert abs(float(y[row, :, 0].std()) - K**0.5) < 1
    assert not torch.equal(y[0], y[2])
    assert torch.equal(
        dash_linear_rows(x, weight, adapters=found, rows=rows, training=False)[0], torch.full((400, N), float(K))
    )


def test_a_transposed_weight_autocast_and_an_adapter_that_a_layer_lacks():
    index = [0, -1, 1, 2]
    x, weight, bias = base(torch.float32, 4, 3)
    found = [adapters()[0], None, adapters()[2]]
    stored = weight.t().contiguous()
    y = dash_linear_rows(x, stored.t(), bias, adapters=found, rows=group_rows(torch.tensor(index)))
    torch.testing.assert_close(
        y, one_by_one(x, weight, bias, found, index, torch.ones_like(y))[0], rtol=1e-5, atol=1e-5
    )
    torch.testing.assert_close(y[2], F.linear(x[2], weight, bias))
    with torch.autocast("cpu", torch.bfloat16):
        half = dash_linear_rows(x, weight, bias, adapters=found, rows=group_rows(index))
    cast = (t.bfloat16() for t in (x, weight, bias))
    assert torch.equal(half, dash_linear_rows(*cast, adapters=found, rows=group_rows(index)))


def test_groups():
    rows = group_rows([2, -1, 2, 0])
    assert (rows.total, rows.numbers, rows.sizes) == (4, (-1, 0, 2), (1, 1, 2))
    assert rows.order.tolist() == [1, 3, 0, 2] and rows.order[rows.inverse].tolist() == [0, 1, 2, 3]
    assert group_rows([-1, 0, 0, 3])[3:] == (None, None)


@pytest.mark.parametrize("index", [[], [0, -2], [0, 1.0], [True], torch.ones(2, 2, dtype=torch.int64), ["a"]])
def test_what_is_no_index(index):
    with pytest.raises(ValueError, match="index must be one integer for each row"):
        group_rows(index)


def test_errors_name_what_does_not_fit():
    x, weight, bias = base(torch.float32, 4, 3)
    found, rows = adapters(), group_rows([0, 1, 2, 0])
    with pytest.raises(ValueError, match=r"x has shape \(12, 40\); wanted \(4, ..., K\)"):
        dash_linear_rows(x.view(12, K), weight, bias, adapters=found, rows=rows)
    with pytest.raises(ValueError, match=r"x has shape \(40,\)"):
        dash_linear_rows(x[0, 0], weight, bias, adapters=found, rows=rows)
    with pytest.raises(ValueError, match="has adapter 2, and there are 2"):
        dash_linear_rows(x, weight, bias, adapters=found[:2], rows=rows)
    with pytest.raises(ValueError, match="weight requires grad"):
        dash_linear_rows(x, weight.requires_grad_(), bias, adapters=found, rows=rows)
    with pytest.raises(ValueError, match="they must agree but for the last dimension"):
        low_rank_update_rows(torch.zeros(4, 2, N), x, adapters=found, rows=rows)
    short = [found[0]._replace(lora_a=torch.zeros(4, K + 1)), *found[1:]]
    with pytest.raises(ValueError, match="lora_a has shape"):
        dash_linear_rows(x, weight.detach(), bias, adapters=short, rows=rows)
