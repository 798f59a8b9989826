"""The plan of a call as numbers: what fits a card's shared memory, and how the workspace grows."""

from __future__ import annotations

import itertools

import pytest
import torch
from support import cuda_emulation as emulation

from loradash_kernels.backends import extension
from loradash_kernels.calls import BackwardCall, ForwardCall
from loradash_kernels.testing import make_case

pytestmark = pytest.mark.skipif(extension.missing_reason is not None, reason=str(extension.missing_reason))

KB = 1024
SHALLOW, ONE_LAUNCH = "64x128_shallow", ["one_launch_128x128", "one_launch_64x128"]
FITTING = {
    48: ["128x128", "64x128", "64x64", SHALLOW],
    64: ["128x128", "64x128", "64x64", SHALLOW],
    99: ["128x256", "128x128", "64x128", "64x64", SHALLOW, *ONE_LAUNCH],
    163: ["128x256", "128x128", "64x128", "64x64", SHALLOW, *ONE_LAUNCH],
    227: ["128x256", "128x128", "64x128", "64x64", SHALLOW, *ONE_LAUNCH],
}


@pytest.mark.parametrize(("kilobytes", "tiles"), FITTING.items())
def test_tiles_fit_the_card(kilobytes, tiles):
    """The list names what fits; whatever is asked for, no launch takes more than the card gives."""
    card = (108, kilobytes * KB)
    assert extension.compiled().cuda_tiles(card) == tiles
    if kilobytes < 99:
        return
    for tile, (r, s), weight in itertools.product(["", *tiles], [(16, 8), (31, 1), (100, 60)], (True, False)):
        case = make_case(300, 136, 400, r, s, torch.bfloat16, adapter_dtype=torch.float32)
        for pass_ in emulation.PASSES:
            launches, _ = emulation.plan(case, emulation.outputs(case), pass_, None, None, card, tile, weight)
            assert max(shared for _, _, _, shared, _ in launches) <= card[1]


@pytest.mark.parametrize("kilobytes", [48, 64])
def test_a_card_with_too_little_is_refused(kilobytes):
    case = make_case(8, 16, 8, 2, 1, torch.bfloat16)
    for pass_ in emulation.PASSES:
        with pytest.raises(ValueError, match=f"take up to {99 * KB} bytes .* the card gives {kilobytes * KB}"):
            emulation.plan(case, emulation.outputs(case), pass_, None, None, (108, kilobytes * KB), "")


def rows(m, n, dtype=torch.bfloat16):
    """(m, n) whose rows share their memory: a plan follows no pointer."""
    return torch.empty(n, dtype=dtype).as_strided((m, n), (0, 1))


def planned(m, k, n, r, s, card, tile=""):
    """Launches and bytes of workspace, forward and backward."""
    p = torch.empty(m, r + s)
    adapters = (torch.empty(r, k), torch.empty(n, r), torch.empty(n, s), torch.empty(s, k), torch.empty(s))
    x, y, w = rows(m, k), rows(m, n), rows(n, k)
    grads = (x, torch.empty(r, k), torch.empty(n, r), torch.empty(s), torch.empty(n))
    forward = ForwardCall(x, w, None, *adapters, None, 1.0, 0, None, y, p)
    backward = BackwardCall(y, x, w, *adapters, p, None, 1.0, 0, *grads)
    compiled = extension.compiled()
    for plan, call in ((compiled.cuda_plan_forward, forward), (compiled.cuda_plan_backward, backward)):
        launches, kept = plan(*call, card, tile)
        yield launches, kept[-1].numel()


def most_partial_bytes(processors, ranks, operand):
    """As csrc/cuda/plan/parts.cpp bounds partial sums of one kind."""
    return -(-ranks // 32) * max(processors * 512 * KB, operand // 32)


# A call whose operands would not fit a card is none.
SIZES = [
    (m, k, n)
    for m in (64, 2048, 16384, 2**20)
    for k in (4096, 128256)
    for n in (4096, 11008, 32000, 128256)
    if m * (k + n) < 2**36
]


@pytest.mark.parametrize(("r", "s"), [(16, 8), (56, 8), (120, 8), (248, 8)])
@pytest.mark.parametrize("processors", [46, 108, 132])
def test_workspace_is_bounded(r, s, processors):
    """Packed operands, T and P once each; partial sums within their bound, or the least that there can be: one part."""
    width = -(-(r + s) // 32) * 32
    for m, k, n in SIZES:
        (_, forward), (_, backward) = planned(m, k, n, r, s, (processors, 99 * KB))
        once = 2 * width * (k + n + m) + (1 << 16)
        chunks = most_partial_bytes(processors, r + s, 2 * m * k)
        assert forward <= once + chunks, (m, k, n)
        parts = [
            max(4 * m * (r + s), most_partial_bytes(processors, r + s, 2 * m * n)),
            max(4 * n * (r + 1), most_partial_bytes(processors, r + s, 2 * m * n)),
            max(4 * k * r, most_partial_bytes(processors, r + s, 2 * m * k)),
        ]
        p_low, sigma = 2 * m * (r + 8), 4 * s * (m // 64 + 1) + 4 * 8 * (m // 64 + 1)
        assert backward <= once + sum(parts) + p_low + sigma, (m, k, n)


@pytest.mark.parametrize(("r", "s"), [(16, 8), (56, 8), (120, 8), (248, 8)])
def test_the_bound_leaves_the_card_full(r, s):
    """Wherever there is enough to do, programs of the pass over dy are as many as the processors, or nearly."""
    for processors, (m, k, n) in itertools.product((46, 108, 132), SIZES):
        if m * n < 2**26:
            continue
        _, (launches, _) = planned(m, k, n, r, s, (processors, 99 * KB))
        (grid,) = [grid for name, grid, *_ in launches if name.startswith("dy_")]
        assert grid[0] * grid[1] * grid[2] >= 0.8 * processors, (m, k, n, grid)


def test_lm_head_of_llama_8b():
    """395 MB were 251 parts of G at 16384 rows."""
    _, (launches, workspace) = planned(16384, 4096, 128256, 16, 8, (108, 163 * KB))
    (grid,) = [grid for name, grid, *_ in launches if name.startswith("dy_")]
    assert grid[0] <= 83 and workspace < 180e6


def test_one_launch_of_many_columns():
    """Its sums over rows are of a tile's rows each: too many, and there are two launches."""
    for n, name in ((4096, "dx_one_launch_128x128_columns_bf16"), (128256, "dy_32_24_bf16")):
        _, (launches, _) = planned(16384, 4096, n, 16, 8, (108, 163 * KB), ONE_LAUNCH[0])
        assert launches[1][0] == name


@pytest.mark.parametrize("processors", [46, 132])
@pytest.mark.parametrize("tile", ONE_LAUNCH)
def test_workspace_of_one_launch_is_bounded(processors, tile):
    """As of two, but for the sums over rows: eight times as much."""
    r, s, taken = 16, 8, 0
    for m, k, n in SIZES:
        _, (launches, backward) = planned(m, k, n, r, s, (processors, 99 * KB), tile)
        taken += launches[1][0].startswith("dx_")
        over_dy = most_partial_bytes(processors, r + 1, 2 * m * n)
        da = max(4 * k * r, most_partial_bytes(processors, r, 2 * m * k))
        packed, once = 64 * (k + n), 2 * m * (32 + r + 8) + 4 * m * (r + s) + m * s // 8 + (1 << 16)
        assert backward <= packed + once + max(4 * n * (r + 1), 8 * over_dy) + da, (m, k, n)
    assert 0 < taken < len(SIZES)
