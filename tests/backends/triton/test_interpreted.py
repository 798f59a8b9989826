"""The Triton backend without a GPU: the choice of it, its tile tables, its tuner, its kernels in the interpreter.

`test_triton_emulated.py` executes the compiled kernels, `test_triton_targets.py` compiles them for every architecture.
"""

from __future__ import annotations

import importlib.util
import json
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import loradash_kernels as lk
from loradash_kernels.backends.triton import backend as triton_backend
from loradash_kernels.backends.triton.target import Target, TileConfig
from loradash_kernels.testing import check_error_rule, make_case, run

TESTS = Path(__file__).parents[2]
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
if importlib.util.find_spec("triton"):
    from loradash_kernels.backends.triton import plan, tiles, tuner
    from loradash_kernels.backends.triton import problem as parts


@needs_triton
@pytest.mark.slow
@pytest.mark.skipif(triton_backend.interpreted(), reason="this is the interpreter")
def test_operator_in_the_interpreter():
    """The operator's own tests with backend="triton", through the public functions, autograd included: a process of its
    own, since Triton decides at import whether it interprets."""
    files = [
        "operator/test_error_rule.py",
        "operator/test_layouts.py",
        "operator/test_odd_inputs.py",
        "operator/test_dropout.py",
        "operator/test_bad_input.py",
        "backends/triton/test_interpreted.py",
        "backends/triton/test_prelaunch_kernels.py",
    ]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-k", "triton", *(str(TESTS / name) for name in files)]
    env = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, cwd=TESTS.parent)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]


@pytest.mark.skipif(not triton_backend.interpreted(), reason="runs within test_operator_in_the_interpreter")
@pytest.mark.parametrize("kind", ["one_launch", "library"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(37, 50, 70, 4, 3), (150, 64, 96, 16, 8)])
def test_strategies(shape, dtype, kind):
    case = make_case(*shape, dtype, adapter_dtype=torch.float32, dropout_p=0.3)
    with tuner.forced(
        forward=parts.Strategy(kind), backward=parts.Strategy("library" if kind == "library" else "fused")
    ):
        check_error_rule(case, run(case, "triton"))


@pytest.mark.skipif(not triton_backend.interpreted(), reason="runs within test_operator_in_the_interpreter")
def test_too_wide_for_the_kernels():
    case = make_case(8, 16, 16, 300, 8)
    assert "at most 256" in lk.explain_backend(case.x, width=308).reasons["triton"]
    with pytest.raises(RuntimeError, match="r \\+ s is 308"):
        run(case, "triton")
    check_error_rule(case, run(case))  # another backend takes it
    with pytest.raises(ValueError, match="at most 32"), tuner.forced(forward=parts.Strategy("one_launch")):
        run(make_case(8, 16, 16, 40, 8), "triton")


# --- the choice ------------------------------------------------------------------------------------------------------


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
    assert "Triton 2.1.0 is too old; 3.6" in fresh(code)


@needs_triton
def test_unknown_architecture(monkeypatch):
    monkeypatch.setattr(triton_backend, "architecture_of", lambda device: "sm_61")
    monkeypatch.setattr(triton_backend, "interpreted", lambda: True)
    assert "sm_61 has no tile table" in triton_backend.refuses(torch.zeros(1, 1))


# --- tiles -----------------------------------------------------------------------------------------------------------


@needs_triton
def test_tiles_are_within_limits():
    for name, target in tiles.TARGETS.items():
        for itemsize in (2, 4):
            for config in (*tiles.gemm_table(target, itemsize), *tiles.one_launch_table(target, itemsize)):
                assert config.shared_bytes(itemsize) <= target.shared_limit, (name, config)
                assert max(config.block_m, config.block_n) <= plan._PAD


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
    case = make_case(1000, 64, 96)
    q = problem(case)
    splits, rows = plan._splits(q, 96, 128, 32)
    assert (splits - 1) * rows < 1000 <= splits * rows and rows % 32 == 0
    assert plan._splits(q, 96, 128, 32) == (splits, rows)


# --- the tuner -------------------------------------------------------------------------------------------------------


def problem(case):
    t = case.tensors
    adapters = [t[name] for name in ("lora_a", "lora_b", "dash_u", "dash_vt", "dash_sigma")]
    return parts.Problem(case.x, t["weight"], *adapters, None, 1.0, 0, tiles.TARGETS["sm_80"])


def chosen(direction, q):
    return tuner.choose(direction, q, (q.x, q.weight))


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LORADASH_CACHE", str(tmp_path / "cache"))
    tuner.MEASURED.forget()
    yield tmp_path / "cache"
    tuner.MEASURED.forget()


def scripted(times):
    """A timer that gives the next of these times, or raises it."""
    queue = iter(times)

    def timer(step):
        value = next(queue)
        if isinstance(value, Exception):
            raise value
        return value

    return timer


@needs_triton
def test_tuner_keeps_the_fastest(cache):
    q = problem(make_case(64, 64, 64))
    candidates = tuner.candidates("forward", q, (q.x, q.weight))
    assert {c.kind for c in candidates} == {"fused", "one_launch", "library"}
    times = [float(len(candidates) - i) for i in range(len(candidates))]
    times[2] = RuntimeError("out of shared memory")  # left out, not fatal
    best = tuner.tune("forward", q, (q.x, q.weight), scripted(times))
    assert best == candidates[-1]
    tuner.MEASURED.forget()
    assert chosen("forward", q) == best  # from disk
    assert chosen("backward", q) is None  # never measured: the table's
    assert chosen("forward", problem(make_case(64, 64, 80))) is None
    assert chosen("forward", problem(make_case(50, 64, 64))) == best  # the same bucket of M
    assert [f.name for f in cache.iterdir() if not f.name.endswith(".lock")] == ["triton-tiles-1.json"]


@needs_triton
def test_tuner_with_nothing_that_runs(cache):
    q = problem(make_case(64, 64, 64))
    with pytest.raises(RuntimeError, match="no candidate ran"):
        tuner.tune("backward", q, (q.x, q.weight), scripted([RuntimeError("no")] * 20))


@needs_triton
@pytest.mark.parametrize("text", ["", "{", "[]", '{"strategies": {"a": {"kind": "magic", "tile": null}}}', "\x00\x01"])
def test_tuner_with_a_damaged_cache(cache, text):
    cache.mkdir()
    tuner.MEASURED.path().write_text(text)
    q = problem(make_case(64, 64, 64))
    tuner.MEASURED.warned.clear()
    with pytest.warns(UserWarning, match="damaged"):
        assert chosen("forward", q) is None
    best = tuner.tune("forward", q, (q.x, q.weight), scripted([1.0] * 20))
    tuner.MEASURED.forget()
    assert chosen("forward", q) == best


@needs_triton
def test_tuner_with_a_cache_that_cannot_be_written(cache):
    cache.write_text("a file where the folder should be")
    q = problem(make_case(64, 64, 64))
    tuner.MEASURED.warned.clear()
    with pytest.warns(UserWarning, match="cannot be written"):
        best = tuner.tune("forward", q, (q.x, q.weight), scripted([1.0] * 20))
    assert chosen("forward", q) == best


def _write(index):
    tuner.MEASURED.forget()
    tuner.MEASURED.remember(f"key {index}", parts.Strategy("fused", TileConfig(64, 64, 32, 4, index + 1)))


@needs_triton
def test_tuner_in_concurrent_processes(cache):
    """Eight processes write at once; nobody's entry is lost and the file is whole."""
    with multiprocessing.get_context("fork").Pool(8) as pool:
        pool.map(_write, range(8), chunksize=1)
    found = json.loads(tuner.MEASURED.path().read_text())["strategies"]
    assert sorted(found) == [f"key {i}" for i in range(8)]


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
