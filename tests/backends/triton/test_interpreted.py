"""The Triton backend without a GPU: why it cannot run, its tile tables and strategies, its kernels in the interpreter.

`test_emulated.py` executes the compiled kernels, `test_targets.py` compiles them for every architecture.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.cards import OnCard, backward_call, forward_call
from support.layouts import slices, transposed

import loradash_kernels as lk
from loradash_kernels.backends import tuning
from loradash_kernels.backends.triton import backend as triton_backend
from loradash_kernels.backends.triton import tiles
from loradash_kernels.backends.triton.target import Target
from loradash_kernels.testing import check_error_rule, make_case, run

TESTS = Path(__file__).parents[2]
# Only these need the interpreter. A bare "triton" would match the folder of this file and all that ran outside already.
INTERPRETED = "[triton or -triton or TestTritonInterpreted or test_strategies or test_too_wide_for_the_kernels"
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
if importlib.util.find_spec("triton"):
    from loradash_kernels.backends.triton import problem as parts
    from loradash_kernels.backends.triton.plan import backward as backward_plan
    from loradash_kernels.backends.triton.plan import forward as forward_plan
    from loradash_kernels.backends.triton.prepared import PlanCache
    from loradash_kernels.backends.triton.strategies import Strategy, candidates


@needs_triton
@pytest.mark.slow
@pytest.mark.skipif(triton_backend.interpreted(), reason="this is the interpreter")
def test_operator_in_the_interpreter():
    """The operator's own tests with backend="triton", through the public functions, autograd included: a process of its
    own, since Triton decides at import whether it interprets."""
    files = [
        "operator/test_error_rule.py",
        # The kernels of a group are those of its members.
        "operator/test_group.py::test_layouts",
        "operator/test_group.py::test_empty",
        "operator/test_layouts.py",
        "operator/test_odd_inputs.py",
        "operator/test_dropout.py",
        "operator/test_windows.py",
        "operator/test_bad_input.py",
        "gpu",
        "backends/triton/test_interpreted.py",
        "backends/triton/test_prelaunch_kernels.py",
        "project/test_walks.py",
    ]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-k", INTERPRETED, *(str(TESTS / name) for name in files)]
    env = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, cwd=TESTS.parent)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]


@pytest.mark.skipif(not triton_backend.interpreted(), reason="runs within test_operator_in_the_interpreter")
@pytest.mark.parametrize("kind", ["fused", "one_launch", "library"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(37, 50, 70, 4, 3), (150, 64, 96, 16, 8)])
def test_strategies(shape, dtype, kind):
    case = make_case(*shape, dtype, adapter_dtype=torch.float32, dropout_p=0.3)
    with tuning.forced(
        "triton", forward=Strategy(kind), backward=Strategy("library" if kind == "library" else "fused")
    ):
        check_error_rule(case, run(case, "triton"))
        # The second time the plans are there.
        check_error_rule(case, run(case, "triton"))


@pytest.mark.skipif(not triton_backend.interpreted(), reason="runs within test_operator_in_the_interpreter")
@pytest.mark.parametrize("layout", [slices, transposed])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strategies_by_layout(layout, dtype):
    """The operator's own tests take the default; these are our tiles."""
    case = make_case(40, 56, 72, 8, 4, dtype, adapter_dtype=torch.float32, dropout_p=0.1)
    layout(case)
    for kind in ("fused", "one_launch"):
        with tuning.forced("triton", forward=Strategy(kind), backward=Strategy()):
            check_error_rule(case, run(case, "triton"))


@pytest.mark.skipif(not triton_backend.interpreted(), reason="runs within test_operator_in_the_interpreter")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_strategies_in_rounds_over_dy(monkeypatch, dtype):
    """Partial sums of G for a few columns at a time, the same bits each time."""
    monkeypatch.setattr(backward_plan, "_G_BYTES", 1)
    triton_backend.PLANS.clear()
    case = make_case(100, 64, 700, 16, 8, dtype, adapter_dtype=torch.float32, dropout_p=0.1)
    with tuning.forced("triton", backward=Strategy()):
        first, again = (run(case, "triton") for _ in range(2))
    triton_backend.PLANS.clear()
    check_error_rule(case, first)
    assert all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.skipif(not triton_backend.interpreted(), reason="runs within test_operator_in_the_interpreter")
@pytest.mark.parametrize("n", [256, 257, 320, 321])
def test_strategies_in_uneven_rounds_over_dy(monkeypatch, n):
    """Four to six tiles, two or three at a time: a first round that is shorter, a last column that is ragged."""
    case = make_case(20, 16, n, 4, 2, torch.float32, dropout_p=0.1)
    for parts in (3, 4):
        monkeypatch.setattr(backward_plan, "_G_BYTES", 4 * 20 * 6 * parts)
        triton_backend.PLANS.clear()
        check_error_rule(case, run(case, "triton"))
    triton_backend.PLANS.clear()


@pytest.mark.skipif(not triton_backend.interpreted(), reason="runs within test_operator_in_the_interpreter")
def test_too_wide_for_the_kernels():
    case = make_case(8, 16, 16, 300, 8)
    assert "at most 256" in lk.explain_backend(case.x, width=308).reasons["triton"]
    with pytest.raises(RuntimeError, match="r \\+ s is 308"):
        run(case, "triton")
    # Another backend takes it.
    check_error_rule(case, run(case))
    with pytest.raises(ValueError, match="at most 32"), tuning.forced("triton", forward=Strategy("one_launch")):
        run(make_case(8, 16, 16, 40, 8), "triton")


@pytest.mark.skipif(triton_backend.interpreted() or torch.cuda.is_available(), reason="Triton can run here")
def test_explains_why_not():
    x = torch.zeros(2, 2)
    assert lk.available_backends()["triton"] is not None
    assert lk.explain_backend(x).reasons["triton"]
    with pytest.raises(RuntimeError, match="backend='triton' cannot run"):
        run(make_case(4, 4, 4), "triton")


def fresh(code: str) -> str:
    """What a new process prints: the reasons are decided once per process."""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


NO_TRITON = """
import importlib.util as u, sys
find = u.find_spec
u.find_spec = lambda name, *a: None if name.split(".")[0] == "triton" else find(name, *a)
import loradash_kernels as lk
print(lk.available_backends()["triton"])
"""


def test_without_triton():
    assert "pip install triton" in fresh(NO_TRITON)


@needs_triton
def test_triton_too_old():
    code = "import triton; triton.__version__ = '2.1.0'; import loradash_kernels as lk; print(lk.available_backends()['triton'])"
    assert "Triton 2.1.0 is too old; 3.3" in fresh(code)


@needs_triton
def test_unknown_architecture(monkeypatch):
    monkeypatch.setattr(triton_backend, "architecture_of", lambda device: "sm_61")
    monkeypatch.setattr(triton_backend, "interpreted", lambda: True)
    assert "sm_61 has no tile table" in triton_backend.refuses(torch.zeros(1, 1))


@needs_triton
def test_tiles_are_within_limits():
    for name, target in tiles.TARGETS.items():
        for itemsize in (2, 4):
            for config in (*tiles.gemm_table(target, itemsize), *tiles.one_launch_table(target, itemsize)):
                assert config.shared_bytes(itemsize) <= target.shared_limit, (name, config)
                assert max(config.block_m, config.block_n) <= backward_plan.PAD


@needs_triton
def test_pick_fills_the_processors():
    target = tiles.TARGETS["sm_80"]
    large, small = (tiles.pick_gemm(target, 2, rows, 4096) for rows in (8192, 64))
    assert large == tiles.GEMM["sm_80"][0]
    assert small == tiles.GEMM["sm_80"][-1]
    assert not tiles.pick_gemm(target, 2, 8192, 4096, depth=4095).tight
    assert not tiles.pick_gemm(target, 2, 8192, 4096, depth=4096, rank_block=128).tight


@needs_triton
def test_partial_sums_are_fixed_by_the_shape():
    """The split of M depends on nothing that changes from run to run, and covers every row once."""
    call = parts.Problem(backward_call(torch.empty(1000, 64)), tiles.TARGETS["sm_80"])
    splits, rows = backward_plan.splits_of_m(call, 96, 128, 32)
    assert (splits - 1) * rows < 1000 <= splits * rows and rows % 32 == 0
    assert backward_plan.splits_of_m(call, 96, 128, 32) == (splits, rows)


def problem(*shape: int, dtype=torch.float32, of=forward_call):
    return parts.Problem(of(torch.empty(shape, dtype=dtype)), tiles.TARGETS["sm_90"])


@needs_triton
def test_candidates():
    """Each tile of the table, and the ways that the call, the card and the layout allow; the one launch is forward's."""
    for of, kinds in ((forward_call, {"one_launch"}), (backward_call, set())):
        found = candidates(problem(64, 64, of=of))
        assert {c.kind for c in found} == {"fused", "library", *kinds}
        # Strings are their names in the file of measurements, so no two may be the same.
        assert len({str(c) for c in found}) == len(found)
    assert "descriptors" in {c.kind for c in candidates(problem(64, 64, dtype=torch.float16))}
    assert "descriptors" not in {c.kind for c in candidates(problem(64, 63, dtype=torch.float16))}
    alone = parts.Problem(forward_call(torch.empty(64, 64))._replace(weight=None), tiles.TARGETS["sm_90"])
    assert {c.kind for c in candidates(alone)} == {"fused"}


@needs_triton
def test_one_launch_tiles_fit_the_card():
    """A tile that a card has no shared memory for is no candidate, nor one that would spill at this depth."""

    def kinds(k, **limits):
        call = forward_call(torch.empty(64, k, dtype=torch.bfloat16))
        return [
            c.tile
            for c in candidates(parts.Problem(call, replace(tiles.TARGETS["sm_90"], **limits)))
            if c.kind == "one_launch"
        ]

    table = tiles.one_launch_table(tiles.TARGETS["sm_90"], 2)
    assert kinds(64) == list(table) and kinds(50) == list(table[1:])
    assert kinds(64, shared_limit=64 * 1024) == list(table[1:]) and kinds(64, shared_limit=1024) == []


@needs_triton
def test_explicit_strategies_and_measured_ones(cache, monkeypatch):
    """A plan is made with what was measured for this call, else with the default."""
    call, told = forward_call(torch.empty(64, 64)), []
    monkeypatch.setattr(triton_backend, "_target_in_use", lambda device: tiles.TARGETS["sm_80"])
    monkeypatch.setattr(forward_plan, "plan_forward", lambda problem, strategy: told.append(strategy) or [])
    monkeypatch.setattr(triton_backend, "PLANS", PlanCache(4))
    best = candidates(parts.Problem(call, tiles.TARGETS["sm_80"]))[-1]
    triton_backend.forward(call)
    tuning.MEASURED.remember(tuning.key("triton", call, "ieee"), str(best))
    triton_backend.forward(call)
    assert told == [None, best]


@needs_triton
def test_guessed_tiles_are_said_once(card, unwarned):
    card(13, 0, shared_limit=99 * 1024)
    with pytest.warns(UserWarning, match="tiles for sm_130 are a guess, those of sm_121") as said:
        assert {triton_backend._target_in_use(OnCard.device).name for _ in range(2)} == {"sm_121"}
    assert len(said) == 1
    card(12, 0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        triton_backend._target_in_use(OnCard.device)


@pytest.mark.parametrize(
    ("architecture", "shared_kb", "expected"),
    [
        ("sm_75", 64, None),
        # No Triton compiles for it.
        ("sm_88", 163, None),
        ("sm_91", 227, "sm_90"),
        ("sm_101", 227, "sm_100"),
        ("sm_101", 99, "sm_89"),
        ("sm_101", None, "sm_89"),
        ("sm_130", 227, "sm_121"),
        ("sm_130", 64, None),
        ("gfx950", 160, "gfx942"),
        ("gfx908", 64, None),
        ("gfx1100", 64, None),
        ("xe", None, None),
    ],
)
def test_unlisted_cards_take_the_nearest_older_table(architecture, shared_kb, expected):
    found = tiles.nearest(architecture, shared_kb and shared_kb * 1024)
    assert (found and found.name) == expected


@needs_triton
def test_the_number_of_rows_compiles_nothing_anew():
    """Triton would compile M = 1, multiples of 16 and the rest apart."""
    from loradash_kernels.backends.triton.kernels import backward as backward_kernels
    from loradash_kernels.backends.triton.kernels import descriptor as descriptor_kernels
    from loradash_kernels.backends.triton.kernels import forward as forward_kernels

    for module in (forward_kernels, backward_kernels, descriptor_kernels):
        for name, kernel in vars(module).items():
            if getattr(kernel, "__module__", "") == module.__name__ and hasattr(kernel, "params") and name[0] != "_":
                assert all(p.do_not_specialize for p in kernel.params if p.name in ("M", "threshold")), name


@needs_triton
def test_target_facts():
    assert Target("x", 1, 1, matrix_instruction="HGMMA").asynchronous
    assert not tiles.TARGETS["sm_86"].asynchronous
