"""Every backend, dtype, tile and strategy against float64 on the device, from memory of NaN."""

from __future__ import annotations

import pytest
import torch
from support.layouts import slices, transposed
from support.matrix import Way, checked, judging_gigabytes, need_memory
from support.sizes import CARD

from loradash_kernels.testing import make_case

WIDE = {"r": 16, "s": 8, "adapter_dtype": torch.float32}


@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
def test_every_way(way: Way, sizes, device, dropout_p):
    """Output and gradients where K and N suit every tile and where they are ragged."""
    taken = 0
    for shape in sizes.tiles:
        case = make_case(*shape, **WIDE, dtype=way.dtype, dropout_p=dropout_p, device=device)
        forced = way.forced(case)
        if forced is not None:
            checked(case, way.backend, **forced)
            taken += 1
    assert taken, "this way takes neither shape"


@pytest.mark.parametrize("layout", [slices, transposed])
def test_every_way_reads_every_layout(way: Way, sizes, device, layout):
    case = make_case(*sizes.tiles[0], **WIDE, dtype=way.dtype, dropout_p=0.1, device=device)
    layout(case)
    # Where this way does not take such a layout, the default of its backend does.
    checked(case, way.backend, **(way.forced(case) or {}))


@pytest.mark.heavy
@pytest.mark.parametrize("index", range(len(CARD.large)))
def test_large(backend, sizes, device, index):
    """Linear layers as models have them."""
    shape = sizes.large[index]
    need_memory(device, judging_gigabytes(*shape))
    checked(make_case(*shape, **WIDE, dtype=torch.bfloat16, dropout_p=0.05, device=device), backend)


@pytest.mark.heavy
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_large_in_other_dtypes(backend, sizes, device, dtype):
    need_memory(device, judging_gigabytes(*sizes.large[0]))
    checked(make_case(*sizes.large[0], **WIDE, dtype=dtype, dropout_p=0.05, device=device), backend)


@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
def test_ragged(backend, sizes, device, dropout_p):
    """Few rows, rows beside the sides of tiles, odd K and N."""
    for shape in sizes.ragged:
        checked(make_case(*shape, **WIDE, dtype=torch.bfloat16, dropout_p=dropout_p, device=device), backend)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("r", "s"), [(1, 0), (8, 8), (64, 8), (248, 8), (300, 8)])
def test_ranks(backend, sizes, device, dtype, r, s):
    """R from 1 to the widest that kernels take, and beyond, which they refuse."""
    case = make_case(*sizes.tiles[-1], r, s, dtype, adapter_dtype=torch.float32, dropout_p=0.1, device=device)
    checked(case, backend)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_low_rank_terms_alone(backend, sizes, device, dtype):
    """`low_rank_update`, on the product that a base layer has computed."""
    case = make_case(*sizes.tiles[-1], **WIDE, dtype=dtype, dropout_p=0.1, device=device)
    checked(case, backend, base=False)
