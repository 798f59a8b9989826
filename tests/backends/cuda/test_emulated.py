"""Every CUDA kernel in every configuration, executed from its PTX without a GPU, against float64.

The emulator raises on races, unwritten or out-of-bounds reads, misaligned accesses, missing waits and deadlocks, so a
case that passes has none of them. Outputs and workspace are NaN before.
"""

from __future__ import annotations

import pytest
import torch
from support import cuda_emulation as emulation
from support.calls import mask_at
from support.layouts import slices, transposed

from loradash_kernels.random import draw_seed, dropout_mask, dropout_threshold, keep_scale
from loradash_kernels.testing import check_error_rule, make_case

pytestmark = [
    pytest.mark.emulated,
    pytest.mark.skipif(emulation.missing_tools() is not None, reason=str(emulation.missing_tools())),
]

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
TILES = ("128x256", "128x128", "64x128", "64x64", "64x128_shallow")


def check(case, **options):
    check_error_rule(case, emulation.emulated_run(case, **options))


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("layout", ["rows", "columns"])
def test_tiles(tile, dtype, layout):
    """Every tile in both orders of W, every option on; more tiles than one along both sides."""
    case = make_case(300, 264, 520, 16, 8, dtype, adapter_dtype=FP32, dropout_p=0.1)
    if layout == "columns":
        case.tensors["weight"] = case.tensors["weight"].t().contiguous().t()
    check(case, tile=tile)


@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize(
    "shape",
    [
        (1, 64, 64, 8, 8),
        (37, 56, 72, 4, 3),
        (130, 96, 200, 5, 3),
        (129, 65, 33, 16, 8),
        (64, 8, 8, 1, 1),
        (5, 7, 3, 2, 1),
        (5, 0, 8, 2, 1),
        (200, 1000, 24, 4, 4),
    ],
)
def test_ragged_shapes(shape, dtype):
    """Rows of whole 16-byte chunks, and the path for those that are not."""
    check(make_case(*shape, dtype, adapter_dtype=FP32, dropout_p=0.3))


@pytest.mark.parametrize("seed", [1, 2, 3, 4])
def test_schedules(seed):
    """Other interleavings of warps and blocks, with fewer blocks resident than there are."""
    check(
        make_case(330, 96, 1100, 8, 4, FP16, adapter_dtype=FP32, dropout_p=0.2),
        seed=seed,
        sms=2,
        ctas_per_sm=1,
        processors=6,
    )


RANKS = [(4, 0), (0, 4), (0, 0), (23, 9), (24, 8), (32, 0), (31, 1), (40, 8), (64, 8), (100, 60), (200, 56), (256, 0)]


@pytest.mark.parametrize(("r", "s"), RANKS)
def test_ranks(r, s):
    check(make_case(150, 96, 136, r, s, BF16, adapter_dtype=FP32, dropout_p=0.1))


def grids(case, pass_, prefix, processors=108):
    """The grids of the kernels whose names begin so."""
    launches, _ = emulation.plan(case, emulation.outputs(case), pass_, None, None, (processors, 163 * 1024), "")
    return [grid for name, grid, *_ in launches if name.startswith(prefix)]


@pytest.mark.parametrize(("m", "n", "r", "s"), [(600, 1040, 16, 8), (1300, 1040, 16, 8), (600, 200, 100, 60)])
def test_splits_of_rows(m, n, r, s):
    """Several programs over M for dB, db and dA, several chunks of columns for G; several groups of ranks too."""
    case = make_case(m, 136, n, r, s, BF16, adapter_dtype=FP32, dropout_p=0.1)
    for prefix, groups in (("dy_", -(-(r + s) // 64)), ("x_", -(-r // 64))):
        ((_, splits, ranks),) = grids(case, "backward", prefix)
        assert splits > 1 and ranks == groups
    check(case)


@pytest.mark.parametrize(("k", "r", "s"), [(1000, 4, 4), (1003, 4, 4), (1003, 100, 60)])
def test_chunks_of_columns(k, r, s):
    """Several programs along K for P, whoever is last adds their parts: aligned and not, in one group of ranks and in more."""
    case = make_case(150, k, 24, r, s, BF16, adapter_dtype=FP32, dropout_p=0.3)
    ((chunks, _, ranks),) = grids(case, "forward", "down_")
    assert chunks > 1 and ranks == -(-(r + s) // 64)
    check(case)


@pytest.mark.parametrize(("r", "s", "n"), [(31, 1, 1100), (56, 8, 1000), (16, 8, 2600), (100, 60, 700)])
@pytest.mark.parametrize("seed", [0, 1])
def test_programs_walk_columns(r, s, n, seed):
    """On a small card partial sums of G may take little: programs walk several chunks of columns and add to their own."""
    case = make_case(1300, 64, n, r, s, BF16, adapter_dtype=FP32)
    (dy,) = grids(case, "backward", "dy_", processors=1)
    width = {32: 256, 64: 128, 24: 512, 160: 128}[r + s]
    assert 1 <= dy[0] < -(-n // width)
    check(case, processors=1, seed=seed, sms=2, ctas_per_sm=1 + seed)


@pytest.mark.parametrize("adapter_dtype", [BF16, FP16, FP32])
def test_adapter_dtypes(adapter_dtype):
    check(make_case(70, 80, 96, 8, 4, BF16, adapter_dtype=adapter_dtype, dropout_p=0.1))


@pytest.mark.parametrize("options", [{"bias": False}, {"dropout_p": 0.0}, {"dropout_p": 0.9}])
def test_options(options):
    check(make_case(70, 80, 96, 8, 4, BF16, adapter_dtype=FP32, **options))


@pytest.mark.parametrize("n", [120, 121])
def test_low_rank_update(n):
    check(make_case(100, 80, n, 8, 4, BF16, adapter_dtype=FP32, dropout_p=0.1), base=False)


@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
@pytest.mark.parametrize(("m", "k", "n"), [(200, 136, 264), (100, 81, 121)])
def test_before_a_library_product(m, k, n, dropout_p):
    """Neither W nor a base, but a bias: y is bias and low-rank terms, dx the masked low-rank term, as with W of zeros."""
    case = make_case(m, k, n, 8, 4, BF16, adapter_dtype=FP32, dropout_p=dropout_p)
    case.tensors["weight"].zero_()
    check(case, weight=False)


def test_launches_before_a_library_product():
    """Packing, pass and a product of rank columns alone, in shallow tiles; backward the same and the sums over M."""
    case, card = make_case(300, 136, 400, 16, 8, BF16, adapter_dtype=FP32), emulation.CARDS["sm_86"]
    out = emulation.outputs(case)
    plans = [emulation.plan(case, out, p, None, None, card, "", False)[0] for p in emulation.PASSES]
    assert [[name for name, *_ in launches] for launches in plans] == [
        ["pack_bf16", "down_32_bf16", "gemm_rows_bf16_64x128_shallow"],
        ["pack_bf16", "dy_32_24_bf16", "gemm_columns_bf16_64x128_shallow", "x_16_bf16", "finish_sums"],
    ]


@pytest.mark.parametrize("layout", [slices, transposed])
@pytest.mark.parametrize("dtype", [FP16, BF16])
def test_layouts(layout, dtype):
    case = make_case(70, 96, 80, 8, 4, dtype, adapter_dtype=FP32, dropout_p=0.1)
    layout(case)
    check(case)


def test_rows_far_apart():
    """Aligned rows with room between them that must not be read as data."""
    case = make_case(70, 96, 80, 8, 4, BF16, adapter_dtype=FP32, dropout_p=0.1)
    for name in ("x", "weight"):
        t = case.tensors[name]
        wide = torch.full((t.shape[0], t.shape[1] + 24), float("nan"), dtype=BF16)
        wide[:, : t.shape[1]] = t
        case.tensors[name] = wide[:, : t.shape[1]]
    check(case)


@pytest.mark.parametrize("wanted", ["x", "lora_a", "lora_b", "dash_sigma", "bias"])
def test_one_gradient_alone(wanted):
    """The others are not touched, and cost no launch of their own."""
    case = make_case(90, 72, 80, 8, 4, BF16, adapter_dtype=FP32, dropout_p=0.1)
    torch.manual_seed(case.seed)
    full = emulation.emulated_run(case)
    found = emulation.emulated_run(case, only=wanted)
    assert torch.equal(found[wanted], full[wanted])
    assert set(found) == {"y", wanted}


def test_same_bits_from_run_to_run():
    """Whatever order the programs run in."""
    case = make_case(700, 72, 1100, 8, 4, BF16, adapter_dtype=FP32, dropout_p=0.1)
    first = emulation.emulated_run(case, seed=1, sms=3)
    for seed in (2, 3):
        again = emulation.emulated_run(case, seed=seed, sms=1, ctas_per_sm=4)
        assert all(torch.equal(first[name], again[name]) for name in first)


def test_same_mask_as_the_reference():
    """x of ones through D of ones counts the kept elements of each row: equal to the reference's mask, row by row."""
    case = make_case(130, 200, 16, 1, 0, BF16, adapter_dtype=FP32, dropout_p=0.4, bias=False)
    case.tensors["x"].fill_(1.0), case.tensors["lora_a"].fill_(1.0)
    out = {"y": torch.empty(130, 16, dtype=BF16), "p": torch.empty(130, 1)}
    torch.manual_seed(case.seed)
    seed = draw_seed()
    launches, kept = emulation.plan(case, out, "forward", seed, None, (108, 163 * 1024), "")
    emulation.emulate(launches, [*out.values(), seed, *kept], "sm_80")
    threshold = dropout_threshold(0.4)
    counts = dropout_mask(seed, threshold, 130, 200).sum(1)
    assert torch.equal((out["p"][:, 0] / keep_scale(threshold)).round().long(), counts)


def test_other_architectures():
    """The binary for RTX 3090 is compiled from other PTX."""
    check(make_case(200, 136, 264, 16, 8, BF16, adapter_dtype=FP32, dropout_p=0.1), architecture="sm_86")


ONE_LAUNCH = ("one_launch_128x128", "one_launch_64x128")


@pytest.mark.parametrize("tile", ONE_LAUNCH)
@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("layout", ["rows", "columns"])
def test_one_launch(tile, dtype, layout):
    case = make_case(300, 136, 400, 16, 8, dtype, adapter_dtype=FP32, dropout_p=0.1)
    if layout == "columns":
        case.tensors["weight"] = case.tensors["weight"].t().contiguous().t()
    check(case, tile=tile)


def test_one_launch_is_one_launch():
    """Beside the packing: one forward; dx with the pass over dy, the pass over x, the second stage of the sums backward."""
    case = make_case(300, 136, 400, 16, 8, BF16, adapter_dtype=FP32)
    names = emulation.planned_names(case, ONE_LAUNCH[0])
    assert names == [
        ["pack_bf16", "one_launch_128x128_rows_bf16"],
        ["pack_bf16", "dx_one_launch_128x128_columns_bf16", "x_16_bf16", "finish_sums"],
    ]
    assert [len(found) for found in emulation.planned_names(case, "")] == [3, 5]


@pytest.mark.parametrize("seed", [0, 1, 2, 3, 4, 5])
def test_one_launch_waits_for_nobody_absent(seed):
    """One processor that holds one block at a time, and more blocks of rows than programs: whoever waits must find the work
    already done."""
    case = make_case(700, 64, 200, 8, 4, FP16, adapter_dtype=FP32)
    check(case, tile="one_launch_64x128", seed=seed, sms=1, ctas_per_sm=1, processors=2)
    check(case, tile="one_launch_64x128", seed=seed, sms=2, ctas_per_sm=2, processors=3)


@pytest.mark.parametrize("shape", [(200, 65, 80, 8, 4), (200, 64, 80, 30, 8), (1, 16, 8, 4, 2), (1, 8, 1000, 4, 2)])
def test_one_launch_where_it_cannot_be(shape):
    """Rows that are not aligned, too many ranks: two launches take the call. One row: it can."""
    check(make_case(*shape, BF16, adapter_dtype=FP32), tile="one_launch_64x128")


@pytest.mark.parametrize("tile", ["", "one_launch_64x128"])
def test_offsets_beyond_two_to_the_31(tile):
    """A row stride of 2^30 elements: three rows span more than 2^31. The memory is reserved, never touched between."""
    case = make_case(3, 32, 32, 4, 2, FP16, adapter_dtype=FP32)
    expected = emulation.emulated_run(case, tile=tile)
    for name in ("x", "dy"):
        try:
            memory = torch.empty(2**31 + 64, dtype=FP16)
        except RuntimeError as error:
            pytest.skip(f"4 GB of address space: {error}")
        far = memory.as_strided((3, 32), (2**30, 1))
        if name == "x":
            far.copy_(case.x)
            case.tensors["x"] = far
        else:
            far.copy_(case.dy)
            case.dy = far
    found = emulation.emulated_run(case, tile=tile)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize(("tile", "weight"), [("", True), ("", False), (ONE_LAUNCH[0], True)])
def test_windows_of_masks(tile, weight):
    """The mask of a part, at a place that no tile begins at, in every kernel that draws one."""
    case, place = make_case(140, 136, 144, 16, 8, BF16, adapter_dtype=FP32, dropout_p=0.3), (37, 200)
    if not weight:
        case.tensors["weight"].zero_()
    found = emulation.emulated_run(case, tile=tile, weight=weight, place=place)
    check_error_rule(case, found, mask_at(case, place))
