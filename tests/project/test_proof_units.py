"""What the proof's own units say where something is wrong: under load, before launch, while building."""

from __future__ import annotations

import contextlib
import subprocess
import sys

import pytest
import torch

from benchmarks.proof import build, prelaunch, stress
from loradash_kernels import change_rates


class Quiet:
    """In the place of a second process."""

    busy = contextlib.nullcontext


@pytest.mark.parametrize(("wrong", "outcome"), [(None, "passed"), ("lora_a", "failed"), ("y", "failed")])
def test_other_bits_under_load_are_a_failure(monkeypatch, wrong, outcome):
    """The first run is the quiet one."""
    real, runs = stress.step, []

    def step(*arguments):
        run = real(*arguments)

        def disturbed():
            found = run()
            if runs and wrong:
                found[wrong] = found[wrong].nextafter(torch.ones_like(found[wrong]))
            runs.append(found)
            return found

        return disturbed

    monkeypatch.setattr(stress, "step", step)
    row = stress.same_bits(stress.case_for("cpu"), "cpu", "cpu", 0.0, {}, Quiet())
    assert row.outcome == outcome and (wrong or "repeats") in row.detail


def test_the_same_wrong_bits_are_a_failure(monkeypatch):
    real = stress.step

    def step(*arguments):
        run = real(*arguments)
        return lambda: {name: 2 * t for name, t in run().items()}

    monkeypatch.setattr(stress, "step", step)
    with pytest.raises(AssertionError, match="of what is allowed"):
        stress.same_bits(stress.case_for("cpu"), "cpu", "cpu", 0.0, {}, Quiet())


def test_a_second_process_works_only_while_it_is_told_to():
    neighbour = stress.Neighbour("cpu")
    try:
        neighbour.begin()
        with neighbour.busy():
            assert neighbour.process.poll() is None
        with pytest.raises(RuntimeError, match="ended early"), neighbour.busy():
            neighbour.end()
    finally:
        neighbour.end()


@pytest.mark.parametrize("shape", [(2, 96, 96), (1, 48, 120), (1, 120, 48)])
def test_the_truth_is_the_exact_method_s(shape):
    w, a, b = (t.double() for t in prelaunch.layers(*shape, "cpu"))
    rates = change_rates(w, a, b, scaling=prelaunch.SCALING, eps=prelaunch.EPS, method="exact").rate
    assert torch.equal(prelaunch.truth(w, a, b), rates.topk(16).indices)


def test_wrong_directions_are_a_failure(monkeypatch):
    monkeypatch.setattr(prelaunch, "seconds", lambda *_, **__: 1.0)
    assert prelaunch.measure(2, 64, 64, "cpu").outcome == "passed"
    real = prelaunch.truth
    monkeypatch.setattr(prelaunch, "truth", lambda *tensors: (real(*tensors) + 7) % 64)
    assert prelaunch.measure(2, 64, 64, "cpu").outcome == "failed"


@pytest.mark.parametrize(("code", "outcome"), [(0, "passed"), (1, "failed"), (build.NO_TRITON, "missing")])
def test_the_check_of_triton(code, outcome):
    argv = [sys.executable, "-c", f"print('one', 'two', sep='\\n'); raise SystemExit({code})"]
    row = build.triton_check(subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))
    assert row.outcome == outcome and row.detail.endswith("two")


@pytest.mark.parametrize(("code", "outcome"), [(0, "passed"), (1, "failed")])
def test_a_source_that_does_not_compile_is_a_failure(monkeypatch, tmp_path, code, outcome):
    nvcc = tmp_path / "nvcc"
    nvcc.write_text(f"#!/bin/sh\nexit {code}\n")
    nvcc.chmod(0o755)
    monkeypatch.setattr(build, "found_program", lambda name: str(nvcc))
    assert build.build_check((9, 0), tmp_path / "cuda_check").outcome == outcome
