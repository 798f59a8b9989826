"""Every Triton kernel, compiled for NVIDIA cards and executed from its PTX, against float64.

The emulator raises on races, unwritten or out-of-bounds reads, misaligned accesses, missing waits and deadlocks, so a
case that passes has none of them. Outputs are NaN before.
"""

from __future__ import annotations

import pytest
import torch
from support import triton_emulation as emulation
from support.calls import mask_at, outputs
from support.layouts import slices, transposed

from loradash_kernels.backends.triton.target import TileConfig
from loradash_kernels.random import dropout_mask
from loradash_kernels.testing import check_error_rule, make_case

pytestmark = [
    pytest.mark.emulated,
    pytest.mark.skipif(emulation.missing_tools() is not None, reason=str(emulation.missing_tools())),
]

if emulation.missing_tools() is None:
    from loradash_kernels.backends.triton.plan import backward as backward_plan
    from loradash_kernels.backends.triton.plan.backward import plan_backward
    from loradash_kernels.backends.triton.plan.forward import plan_forward
    from loradash_kernels.backends.triton.strategies import Strategy, descriptors_fit

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
SMALL = TileConfig(64, 64, 32, 4, 3, group_m=2)


def check(case, architecture="sm_80", **options):
    check_error_rule(case, emulation.emulated_run(case, architecture, **options))


@pytest.mark.parametrize("architecture", ["sm_80", "sm_86", "sm_90"])
@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_architectures(architecture, dtype):
    """The tables' largest tiles (one processor is soon filled) and their smallest, every option on."""
    case = make_case(200, 256, 320, 16, 8, dtype, adapter_dtype=FP32, dropout_p=0.1)
    check(case, architecture, processors=1)
    check(case, architecture)


@pytest.mark.parametrize("dtype", [BF16, FP32])
@pytest.mark.parametrize("shape", [(1, 64, 64, 8, 8), (37, 50, 70, 4, 3), (130, 96, 200, 5, 3), (129, 65, 33, 16, 8)])
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
def test_ragged_shapes(shape, dtype, architecture):
    check(make_case(*shape, dtype, adapter_dtype=FP32, dropout_p=0.3), architecture)


@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("kind", ["fused", "one_launch"])
def test_schedules(kind, seed):
    """Other interleavings of warps and blocks; more blocks of rows than two processors hold."""
    tile = SMALL if kind == "fused" else TileConfig(32, 32, 32, 4, 3, group_m=3)
    case = make_case(170, 96, 120, 8, 4, FP16, adapter_dtype=FP32, dropout_p=0.2)
    check(case, forward=Strategy(kind, tile), seed=seed, sms=2, ctas_per_sm=1)


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
@pytest.mark.parametrize("shape", [(1, 16, 16, 4, 2), (300, 160, 170, 16, 8), (64, 33, 47, 16, 8)])
def test_one_launch(shape, architecture):
    case = make_case(*shape, BF16, adapter_dtype=FP32, dropout_p=0.1)
    check(case, architecture, forward=Strategy("one_launch"))


def test_one_launch_waits_for_nobody_absent():
    """One processor that holds one block at a time: whoever waits must find the work already done."""
    case = make_case(200, 64, 200, 8, 4, FP16, adapter_dtype=FP32)
    for seed in (0, 5):
        check(case, forward=Strategy("one_launch", SMALL), seed=seed, sms=1, ctas_per_sm=1)


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
@pytest.mark.parametrize(("r", "s"), [(4, 0), (0, 4), (0, 0), (40, 8), (100, 60), (200, 56)])
def test_ranks(r, s, architecture):
    check(make_case(300, 96, 128, r, s, BF16, adapter_dtype=FP32, dropout_p=0.1), architecture)


@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_low_rank_update(dtype):
    check(make_case(100, 80, 120, 8, 4, dtype, adapter_dtype=FP32, dropout_p=0.1), base=False)


@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize(
    "shape", [(1, 64, 64, 8, 8), (200, 256, 320, 16, 8), (130, 96, 200, 5, 3), (300, 72, 136, 60, 40)]
)
@pytest.mark.parametrize("seed", [0, 3])
def test_descriptors(shape, dtype, seed):
    """Persistent kernels on tensor descriptors, with fewer programs than tiles."""
    case = make_case(*shape, dtype, adapter_dtype=FP32, dropout_p=0.1)
    strategy = Strategy("descriptors", TileConfig(64, 64, 64, 4, 3, group_m=2))
    problem, _ = emulation.problems_of(case, "sm_90")
    assert descriptors_fit(problem, case.x, case.tensors["weight"], case.dy)
    check(case, "sm_90", forward=strategy, backward=strategy, seed=seed, processors=3)


def test_descriptors_where_rows_are_not_aligned():
    case = make_case(70, 99, 81, 8, 4, BF16, adapter_dtype=FP32)
    check(case, "sm_90", forward=Strategy("descriptors"), backward=Strategy("descriptors"))


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
@pytest.mark.parametrize(("shape", "dtype"), [((100, 80, 120, 8, 4), BF16), ((37, 50, 70, 4, 3), FP32)])
def test_library_product(shape, dtype, architecture):
    """The default: the low-rank terms and the bias by kernels, then the library's product on top."""
    library = Strategy("library")
    case = make_case(*shape, dtype, adapter_dtype=FP32, dropout_p=0.1)
    check(case, architecture, forward=library, backward=library)
    transposed(case)
    check(case, architecture, forward=library, backward=library)


@pytest.mark.parametrize("tiles", [1, 2])
@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_dy_in_rounds(monkeypatch, dtype, tiles):
    """Partial sums of G for one or two of five tiles of columns at a time: five rounds, or three, the first of them shorter."""
    m, n, r, s = 70, 1100 if dtype == BF16 else 270, 8, 4
    monkeypatch.setattr(backward_plan, "_G_BYTES", 4 * m * (r + s) * (tiles + 1))
    case = make_case(m, 48, n, r, s, dtype, adapter_dtype=FP32, dropout_p=0.1)
    names = [
        launch.kernel.__name__ for launch in plan_backward(emulation.problems_of(case, "sm_80")[1], Strategy("fused"))
    ]
    rounds = {1: 5, 2: 3}[tiles]
    assert names.count("dy_pass") == rounds and names.count("add_parts") == rounds - 1
    check(case)


@pytest.mark.parametrize("layout", [slices, transposed])
@pytest.mark.parametrize("dtype", [FP16, FP32])
def test_layouts(layout, dtype):
    case = make_case(70, 96, 80, 8, 4, dtype, adapter_dtype=FP32, dropout_p=0.1)
    layout(case)
    check(case)


def test_offsets_beyond_two_to_the_31():
    """A row stride of 2^30 elements: three rows span more than 2^31. The memory is reserved, never touched between."""
    case = make_case(3, 32, 32, 4, 2, FP16, adapter_dtype=FP32)
    expected = emulation.emulated_run(case, "sm_80")["y"]
    try:
        memory = torch.empty(2**31 + 64, dtype=FP16)
    except RuntimeError as error:
        pytest.skip(f"4 GB of address space: {error}")
    far = memory.as_strided((3, 32), (2**30, 1))
    far.copy_(case.x)
    case.tensors["x"] = far
    out = outputs(case)
    launches = plan_forward(emulation.problems_of(case, "sm_80", out)[0], Strategy("fused"))
    assert all(launch.constants["WIDE"] for launch in launches)
    emulation.run_plan(launches, "sm_80")
    assert torch.equal(out["y"], expected)


def test_same_mask_as_the_reference():
    """x of ones through D of ones counts the kept elements of each row: equal to the reference's mask, row by row."""
    case = make_case(50, 200, 16, 1, 0, FP32, dropout_p=0.4, bias=False)
    case.tensors["x"].fill_(1.0), case.tensors["lora_a"].fill_(1.0)
    problem, _ = emulation.problems_of(case, "sm_80")
    emulation.run_plan(plan_forward(problem, Strategy("fused")), "sm_80")
    kept = dropout_mask(problem.seed, problem.threshold, 50, 200).sum(1)
    assert torch.equal((problem.call.p[:, 0] / problem.keep_scale).round().long(), kept)


@pytest.mark.parametrize(
    ("kind", "architecture", "dtype"),
    [("fused", "sm_80", BF16), ("fused", "sm_90", FP32), ("one_launch", "sm_80", FP16), ("descriptors", "sm_90", BF16)],
)
def test_windows_of_masks(kind, architecture, dtype):
    """The mask of a part, at a place that no tile begins at, in every kernel that draws one."""
    case, place = make_case(70, 128, 144, 8, 4, dtype, adapter_dtype=FP32, dropout_p=0.3), (37, 200)
    backward = "descriptors" if kind == "descriptors" else "fused"
    strategies = {"forward": Strategy(kind), "backward": Strategy(backward)}
    found = emulation.emulated_run(case, architecture, place=place, **strategies)
    check_error_rule(case, found, mask_at(case, place))
