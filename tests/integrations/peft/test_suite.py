"""A part of PEFT's own tests, with this library beneath them. All of them: `make peft-tests`."""

from __future__ import annotations

import importlib.util
import os

import pytest

from tools.peft_tests import compare, runs, sdist
from tools.peft_tests.suite import SLICE

# PEFT's tests import the others, in processes of their own.
for name in ("peft", "diffusers", "datasets", "parameterized"):
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"needs {name}", allow_module_level=True)

FEWEST = 50


@pytest.fixture(scope="module")
def folder():
    try:
        return sdist.unpacked()
    except sdist.NoSdist as reason:
        # Where there must be a network, a missing sdist is a fault.
        if os.environ.get("CI"):
            raise
        pytest.skip(str(reason))


@pytest.mark.parametrize("switch", ["accelerate", "launched"])
def test_a_part_of_pefts_tests(folder, switch):
    """All pass that have no reason to fail, as they do with PEFT alone; most calls of layers run fused."""
    (run,) = runs.run(folder, [(SLICE, switch)], "closed", 1, lambda running: None)
    tests = run.finished()
    ended = [test for test in tests if not compare.reason(switch, test.test, test.message)]
    assert {test.test: test.message for test in ended if test.outcome not in ("passed", "skipped")} == {}
    assert runs.counts(tests)["passed"] >= FEWEST
    calls = compare.calls(tests)
    assert calls["fused"] > calls.total() / 2, calls
