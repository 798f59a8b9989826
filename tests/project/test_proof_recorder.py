"""The plugin that writes down every test as it ends: outcomes, crashes, what goes on after them, and time that is up."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.proof.ledger import Ledger
from benchmarks.proof.worker import LEDGER, SECONDS, START_AGAIN, TIME_IS_UP

ROOT = Path(__file__).parents[2]
TESTS = """
import os, signal, sys, time, types
import pytest

def test_passes(): pass
def test_fails(): assert 1 == 2, "one is not two"
@pytest.mark.skip(reason="no such card")
def test_is_skipped(): pass
@pytest.mark.xfail(reason="known")
def test_is_expected_to_fail(): assert False
@pytest.fixture
def broken(): raise RuntimeError("the fixture broke")
def test_has_a_broken_fixture(broken): pass
@pytest.fixture
def late():
    yield
    raise RuntimeError("the teardown broke")
def test_has_a_broken_teardown(late): pass
@pytest.mark.parametrize("n", [0, 1])
def test_is_parametrized(n): pass
"""


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "test_toy.py").write_text(TESTS)
    return tmp_path


def run(folder, *arguments: str, seconds: float = 300) -> tuple[int, dict[str, str], Ledger]:
    ledger = Ledger(folder / "rows-0.jsonl")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), LEDGER: str(ledger.path), SECONDS: str(seconds)}
    argv = [sys.executable, "-m", "pytest", "-q", "-p", "benchmarks.proof.recorder", "-p", "no:cacheprovider"]
    done = subprocess.run([*argv, *arguments, "."], cwd=folder, env=environment, capture_output=True, text=True)
    return done.returncode, {row.name.partition("::test_")[2]: row.outcome for row in ledger.rows()}, ledger


def test_a_file_that_is_skipped_is_missing(folder):
    (folder / "test_other.py").write_text("import pytest\npytest.importorskip('no_such_package')\ndef test_it(): pass")
    _, _, ledger = run(folder, "test_other.py")
    row = next(row for row in ledger.rows() if "test_other" in row.name)
    assert row.outcome == "missing" and "no_such_package" in row.detail


def test_every_outcome_is_written_down(folder):
    code, found, ledger = run(folder)
    assert code == 1
    assert found == {
        "passes": "passed",
        "fails": "failed",
        "is_skipped": "missing",
        "is_expected_to_fail": "passed",
        "has_a_broken_fixture": "failed",
        "has_a_broken_teardown": "failed",
        "is_parametrized[0]": "passed",
        "is_parametrized[1]": "passed",
    }
    details = {row.name.partition("::test_")[2]: row.detail for row in ledger.rows()}
    assert "one is not two" in details["fails"] and "the fixture broke" in details["has_a_broken_fixture"]
    assert "no such card" in details["is_skipped"] and "the teardown broke" in details["has_a_broken_teardown"]
    assert ledger.open() == []


def test_what_has_ended_is_not_run_again(folder):
    run(folder, "-k", "parametrized or passes")
    ledger = folder / "rows-0.jsonl"
    before = ledger.read_text()
    code, found, _ = run(folder, "-k", "parametrized or fails")
    assert code == 1 and len(found) == 4
    added = ledger.read_text()[len(before) :]
    assert "test_fails" in added and "parametrized" not in added
    assert run(folder, "-k", "parametrized or fails")[0] == 5


def test_a_crash_leaves_its_test_open(folder):
    (folder / "test_toy.py").write_text("import os\ndef test_a(): pass\ndef test_b(): os.abort()\ndef test_c(): pass\n")
    code, found, ledger = run(folder)
    assert code == -6 and found == {"a": "passed"}
    assert ledger.open() == ["test_toy.py::test_b"]


def test_no_test_begins_when_time_is_up(folder):
    code, found, _ = run(folder, seconds=0)
    assert code == TIME_IS_UP and len(found) == 1
    # Each start gets on.
    assert len(run(folder, seconds=0)[1]) == 2


def test_a_file_that_cannot_be_imported_fails(folder):
    (folder / "test_broken.py").write_text("import no_such_module")
    code, found, ledger = run(folder, "--continue-on-collection-errors")
    assert code == 1 and found["passes"] == "passed"
    assert any("test_broken.py (collection)" in row.name and row.outcome == "failed" for row in ledger.rows())


BROKEN_CONTEXT = """
import sys, types

class Cuda:
    @staticmethod
    def is_initialized(): return True
    @staticmethod
    def synchronize(): raise RuntimeError("CUDA error: an illegal memory access was encountered")

sys.modules["torch"] = types.SimpleNamespace(cuda=Cuda)
def test_a(): raise RuntimeError("an illegal memory access")
def test_b(): pass
"""


def test_a_broken_context_ends_the_process(folder):
    """Every later test would fail in it, too. Here a pretended PyTorch says that it is broken."""
    (folder / "test_toy.py").write_text(BROKEN_CONTEXT)
    code, found, _ = run(folder)
    assert code == START_AGAIN and found == {"a": "failed"}
    assert run(folder)[1] == {"a": "failed", "b": "passed"}
