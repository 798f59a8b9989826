"""No arm gets a time before it passes: what passes, and that wrong layers do not."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from benchmarks.layers import checks
from benchmarks.layers.backends import by_backend
from benchmarks.layers.in_place import InPlaceLora
from benchmarks.layers.variants import COMPILED, DENSE, FACTORED, FROZEN, IN_PLACE, OURS, PEFT, make_case, make_inputs

SHAPE = (80, 48, 56)
PEERS = (PEFT, DENSE, FACTORED, COMPILED, IN_PLACE)


@pytest.fixture(autouse=True)
def small_samples(monkeypatch):
    """Samples of 24 rows and 32 columns, so that something lies outside of them."""
    monkeypatch.setattr(checks, "ROWS", 24)
    monkeypatch.setattr(checks, "WEIGHT_ELEMENTS", 32 * SHAPE[1])


def case_of(name, dtype=torch.float32, dropout=0.1):
    inputs = make_inputs(SHAPE, dtype)
    return make_case(name, inputs, dropout, 4, compiler="aot_eager"), inputs.weight


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", PEERS)
def test_peers_pass(name, dtype):
    case, weight = case_of(name, dtype)
    checks.check_by_norms(case, weight)
    assert case.layer.training and all(leaf.grad is None for leaf in case.leaves)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ours_passes(dtype, dropout):
    case, weight = case_of(OURS, dtype, dropout)
    checks.check_ours(case, weight, dropout)
    checks.check_ours(by_backend(case, "reference"), weight, dropout)


class Wrong(nn.Module):
    """A layer of which something is wrong."""

    def __init__(self, layer, after):
        super().__init__()
        self.layer, self.after = layer, after

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("layer"), name)

    def forward(self, x):
        return self.after(self.layer, x)


def one_row_off(layer, x):
    y = layer(x)
    # The last row is in every sample.
    return torch.cat((y[:-1], y[-1:] * 1.5))


WRONG = {
    "a row": one_row_off,
    "no low-rank terms": lambda layer, x: nn.functional.linear(x, layer.weight),
    "a gradient": lambda layer, x: layer(x) + 0.1 * (x.sum() - x.sum().detach()),
    "not a number": lambda layer, x: layer(x) * torch.where(torch.arange(56) == 55, torch.nan, 1.0),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_ours_does_not_pass_where_something_is_wrong(wrong):
    case, weight = case_of(OURS)
    case.layer = Wrong(case.layer, WRONG[wrong])
    with pytest.raises(AssertionError):
        checks.check_ours(case, weight, 0.1)


@pytest.mark.parametrize("wrong", WRONG)
def test_peers_do_not_pass_where_something_is_wrong(wrong):
    case, weight = case_of(FACTORED)
    case.layer = Wrong(case.layer, WRONG[wrong])
    with pytest.raises(AssertionError):
        checks.check_by_norms(case, weight)


def test_another_mask_does_not_pass():
    case, weight = case_of(OURS, dropout=0.1)
    with pytest.raises(AssertionError):
        checks.check_ours(case, weight, 0.2)


def test_the_tolerance_follows_from_the_dtype():
    wide, narrow = (checks.tolerance(dtype, 4096) for dtype in (torch.float32, torch.bfloat16))
    assert wide < 1e-4 < checks.tolerance(torch.float16, 4096) < narrow < 0.04
    assert wide < checks.tolerance(torch.float32, 4096, tf32=True) < 0.005


@pytest.mark.parametrize(("size", "count"), [(5, 8), (80, 24), (16384, 256)])
def test_rows_of_every_stripe(size, count):
    found = checks.spread_out(size, count, torch.device("cpu")).tolist()
    assert found == sorted(set(found)) and len(found) == min(size, count)
    assert (found[0], found[-1]) == (0, size - 1)
    assert max(b - a for a, b in itertools.pairwise(found)) <= 2 * -(-size // count)


def test_the_function_that_adds_in_place_is_lora_with_its_dropout():
    m, k, n, r, p = 40, 24, 32, 4, 0.3
    torch.manual_seed(0)
    x, w, a, b = (torch.randn(s, dtype=torch.float64) for s in ((m, k), (n, k), (r, k), (n, r)))
    leaves = [t.requires_grad_() for t in (x, a, b)]
    dy = torch.randn(m, n, dtype=torch.float64)
    torch.manual_seed(5)
    mask = torch.native_dropout(x.detach(), p, True)[1]
    dropped = x * mask / (1 - p)
    expected = x @ w.t() + 2.0 * (dropped @ a.t()) @ b.t()
    wanted = torch.autograd.grad(expected, leaves, dy)
    torch.manual_seed(5)
    y = InPlaceLora.apply(x, w, a, b, 2.0, p)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(torch.autograd.grad(y, leaves, dy), wanted)


def test_the_frozen_layer_trains_nothing():
    case, _ = case_of(FROZEN)
    assert case.leaves == [case.x]
