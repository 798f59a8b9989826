"""Tensors whose elements no 32-bit index counts: more than 2^31 of them, or rows that far apart.

dy is zero but in some rows (or columns), which makes every gradient that of these alone: they are judged as a case of their
own, with their part of the mask. The rehearsal does the same to small tensors.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from support.matrix import checked, need_memory, poisoned
from support.sizes import Sizes

from loradash_kernels.random import draw_seed, dropout_rows, dropout_threshold
from loradash_kernels.testing import Case, check_error_rule, make_case, run

pytestmark = pytest.mark.heavy
DROPOUT = 0.1
RANKS = {"r": 16, "s": 8, "dtype": torch.bfloat16, "adapter_dtype": torch.float32, "dropout_p": DROPOUT}


def room_for(backend: str, sizes: Sizes, device: torch.device) -> None:
    """Skips where the card has no room for x in 32 bits, in 16, its copy, dx, and one more, which only plain PyTorch takes."""
    need_memory(device, (6 + (backend == "reference")) * sizes.many * 2e-9)


def chosen(count: int, crossing: int, device: torch.device) -> torch.Tensor:
    """Indices below `count`: the ends, those beside the crossing of 2^31, and some of any."""
    beside = [i for at in (0, crossing, count - 1) for i in range(at - 2, at + 3) if 0 <= i < count]
    anywhere = torch.randint(count, (16,), generator=torch.Generator().manual_seed(0)).tolist()
    return torch.tensor(sorted({*beside, *anywhere}), device=device)


def zero_elsewhere(t: torch.Tensor, index: torch.Tensor, axis: int) -> None:
    kept = t.index_select(axis, index)
    t.zero_().index_copy_(axis, index, kept)


def mask_of(case: Case, rows: torch.Tensor) -> torch.Tensor:
    """These rows of the mask that `run` draws."""
    torch.manual_seed(case.seed)
    return dropout_rows(draw_seed(case.device), dropout_threshold(case.dropout_p), rows, case.x.shape[1])


@pytest.mark.parametrize("which", ["x and dx", "y and dy"])
def test_many_rows(backend, sizes, device, which):
    """M times the wider side exceeds 2^31; the other side is short."""
    room_for(backend, sizes, device)
    wide, short = sizes.wide, 64
    m = sizes.many // wide + 7
    k, n = (wide, short) if which == "x and dx" else (short, wide)
    case = make_case(m, k, n, **RANKS, device=device)
    rows = chosen(m, sizes.many // wide, device)
    zero_elsewhere(case.dy, rows, 0)
    with poisoned(device):
        found = run(case, backend)
    assert all(bool(part.isfinite().all()) for part in found["y"].split(2**14)), "something of y is not written"
    strays = sum(int(part.count_nonzero()) for part in found["x"].split(2**14))
    assert strays == int(found["x"][rows].count_nonzero()), "dx is not zero where dy is"
    part = replace(case, tensors={**case.tensors, "x": case.x[rows]}, dy=case.dy[rows])
    check_error_rule(part, {**found, "y": found["y"][rows], "x": found["x"][rows]}, mask_of(case, rows))


def test_many_columns(backend, sizes, device):
    """W (N, K) exceeds 2^31 elements."""
    room_for(backend, sizes, device)
    n = sizes.many // sizes.wide + 7
    case = make_case(48, sizes.wide, n, **RANKS, device=device)
    columns = chosen(n, sizes.many // sizes.wide, device)
    zero_elsewhere(case.dy, columns, 1)
    with poisoned(device):
        found = run(case, backend)
    assert bool(found["y"].isfinite().all()), "something of y is not written"
    of_columns = ("weight", "bias", "lora_b", "dash_u")
    kept = {name: t[columns] if name in of_columns else t for name, t in case.tensors.items()}
    results = {name: t[columns] if name in of_columns else t for name, t in found.items()}
    part = replace(case, tensors=kept, dy=case.dy[:, columns])
    check_error_rule(part, {**results, "y": found["y"][:, columns]}, mask_of(case, torch.arange(48, device=device)))


def far_apart(t: torch.Tensor, stride: int) -> torch.Tensor:
    """The same rows, `stride` elements apart, among NaN."""
    wide = t.new_full((t.shape[0] * stride,), torch.nan).as_strided(t.shape, (stride, 1))
    return wide.copy_(t)


@pytest.mark.parametrize("name", ["x", "weight", "dy", "lora_b"])
def test_rows_far_apart(backend, sizes, device, name):
    """The last row begins beyond 2^31 elements."""
    room_for(backend, sizes, device)
    rows = sizes.many // sizes.far + 3
    case = make_case(rows, 72, rows, **RANKS, device=device)
    if name == "dy":
        case = replace(case, dy=far_apart(case.dy, sizes.far))
    else:
        case = replace(case, tensors={**case.tensors, name: far_apart(case.tensors[name], sizes.far)})
    checked(case, backend)
