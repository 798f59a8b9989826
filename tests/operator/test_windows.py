"""A window of a mask: a call on a part of a matrix draws what a call on the whole draws there."""

from __future__ import annotations

import dataclasses
from functools import partial

import pytest
import torch
from support.devices import plain_dtype

from loradash_kernels.backends import extension
from loradash_kernels.random import draw_seed, dropout_mask, dropout_rows, dropout_threshold, window
from loradash_kernels.testing import GRADIENTS, Case, check_error_rule, make_case

compiled = pytest.mark.skipif(not extension.is_compiled(), reason="the compiled part is missing")
THRESHOLD = 20000
# They begin at these places of a matrix and have these sizes.
WINDOWS = [(0, 0, 40, 100), (7, 8, 20, 31), (1, 64, 64, 1000), (63, 2040, 3, 2200), (5, 24, 0, 9), (5, 24, 9, 0)]


def signed(value: int) -> int:
    return value - 2**64 if value >= 2**63 else value


@pytest.mark.parametrize(("row", "column", "m", "k"), WINDOWS)
def test_a_window_is_a_slice(row, column, m, k):
    seed = torch.tensor([signed(0xFEDCBA9876543210), signed(0xF123456789ABCDEF)])
    whole = dropout_mask(seed, THRESHOLD, row + m, column + k)[row:, column:]
    part = window(seed, row, column)
    assert part.shape == (4,) and part.dtype == torch.int64
    assert torch.equal(dropout_mask(part, THRESHOLD, m, k), whole)
    some = torch.arange(m)[::3]
    assert torch.equal(dropout_rows(part, THRESHOLD, some, k), whole[some])
    if extension.is_compiled():
        assert torch.equal(torch.ops.loradash_cpu.dropout_mask(part, THRESHOLD, m, k), whole)


def test_windows_of_windows_add_up():
    seed = draw_seed()
    nested = window(window(window(seed, 3, 8), 0, 0), 10, 64)
    assert torch.equal(nested, window(seed, 13, 72)) and torch.equal(nested[:2], seed)


@compiled
def test_the_last_places_that_counters_reach():
    """Rows and columns of 32 bits, where signed numbers would go wrong."""
    seed = draw_seed()
    part = window(window(seed, 2**31 - 1, 2**31 - 8), 2**31 - 3, 2**31 - 16)
    assert part[2:].tolist() == [2**32 - 4, 2**32 - 24]
    rows = torch.arange(2**32 - 4, 2**32)
    wanted = dropout_rows(window(seed, 0, 2**32 - 24), THRESHOLD, rows, 24)
    assert torch.equal(torch.ops.loradash_cpu.dropout_mask(part, THRESHOLD, 4, 24), wanted)
    assert torch.equal(dropout_mask(part, THRESHOLD, 4, 24), wanted)


def part_of(case: Case, rows: slice, columns: slice) -> Case:
    """The part of a case that its x[rows, columns] is, with views for operands."""
    t = dict(case.tensors)
    t["x"] = case.x[rows, columns]
    for name in ("weight", "lora_a", "dash_vt"):
        t[name] = t[name][:, columns]
    return dataclasses.replace(case, tensors=t, dy=case.dy[rows])


def run_with(case: Case, seed: torch.Tensor, backend: str | None) -> dict[str, torch.Tensor]:
    """Output and gradients of the operator, given this seed."""
    t = {n: None if v is None else v.detach().requires_grad_(n in GRADIENTS) for n, v in case.tensors.items()}
    options = (seed, case.scaling, dropout_threshold(case.dropout_p), backend)
    names = ("x", "weight", "bias", "lora_a", "lora_b", "dash_u", "dash_vt", "dash_sigma")
    y, _ = torch.ops.loradash.dash_linear(*(t[name] for name in names), *options)
    wanted = [name for name in GRADIENTS if t[name] is not None]
    gradients = torch.autograd.grad(y, [t[name] for name in wanted], case.dy)
    return {"y": y.detach(), **dict(zip(wanted, gradients, strict=True))}


@pytest.fixture
def case(backend, device):
    return make_case(70, 208, 40, 5, 3, plain_dtype(backend), dropout_p=0.3, device=device)


def mask_of(case: Case, seed: torch.Tensor) -> torch.Tensor:
    return dropout_mask(seed, dropout_threshold(case.dropout_p), *case.x.shape)


@pytest.mark.parametrize("row", [0, 33])
@pytest.mark.parametrize("columns", [slice(0, 104), slice(104, 208), slice(8, 51)])
def test_forward_and_backward_of_a_window(backend, case, row, columns):
    seed, rows = draw_seed(case.device), slice(row, None)
    found = run_with(part_of(case, rows, columns), window(seed, row, columns.start), backend)
    check_error_rule(part_of(case, rows, columns), found, mask_of(case, seed)[rows, columns])


def test_shards_of_the_columns_sum_to_the_whole():
    """What each rank of a row-parallel layer computes: y and the gradients of the small factors are sums."""
    case = make_case(70, 208, 40, 5, 3, dropout_p=0.3)
    seed, joined = draw_seed(), {}
    for columns in (slice(0, 72), slice(72, 144), slice(144, 208)):
        part = part_of(case, slice(None), columns)
        if columns.start:
            part.tensors["bias"] = None
        for name, value in run_with(part, window(seed, 0, columns.start), None).items():
            joined.setdefault(name, []).append(value)
    found = {n: torch.cat(v, 1) if n in ("x", "lora_a") else torch.stack(v).sum(0) for n, v in joined.items()}
    check_error_rule(case, found, mask_of(case, seed))


@pytest.mark.parametrize(
    ("place", "said"),
    [
        ((0, 12), "column is 12; wanted a multiple of 8"),
        ((0, -8), "column is -8"),
        ((-1, 0), "row is -1"),
        ((2**32, 0), "row is 4294967296"),
        ((0, 2**32), "column is 4294967296"),
    ],
)
def test_no_window(place, said):
    with pytest.raises(ValueError, match=said):
        window(draw_seed(), *place)


def test_a_sum_of_places_beyond_the_counters():
    with pytest.raises(ValueError, match="seed begins at row 4294967296"):
        window(window(draw_seed(), 2**31, 0), 2**31, 0)


@pytest.mark.parametrize("pass_", ["forward", "backward"])
@pytest.mark.parametrize(
    ("seed", "said"),
    [
        (torch.zeros(3, dtype=torch.int64), "seed has shape"),
        (torch.zeros(2, dtype=torch.int32), "dtype torch.int32"),
        (torch.zeros(1, 2, dtype=torch.int64), "seed has shape"),
        (torch.zeros(2, 2, dtype=torch.int64)[:, 0], "contiguous"),
        (torch.zeros(2, dtype=torch.int64, device="meta"), "seed is on meta"),
        (torch.tensor([1, 2, 0, 4]), "begins at column 4"),
        (torch.tensor([1, 2, 2**32 - 5, 0]), "begins at row 4294967291"),
        (torch.tensor([1, 2, -1, 0]), "begins at row -1"),
    ],
)
def test_no_seed(seed, said, pass_):
    case = make_case(6, 8, 10)
    adapters = [case.tensors[name] for name in ("lora_a", "lora_b", "dash_u", "dash_vt", "dash_sigma")]
    options = (seed, 2.0, THRESHOLD)
    update = partial(torch.ops.loradash.low_rank_update, case.dy, case.x, *adapters, *options, None)
    p, needs = torch.zeros(6, 7), [True] * 5
    backward = partial(
        torch.ops.loradash.dash_linear_backward, case.dy, case.x, None, *adapters, p, *options, needs, None
    )
    with pytest.raises(ValueError, match=said):
        {"forward": update, "backward": backward}[pass_]()
