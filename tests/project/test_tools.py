"""The tools beside the library: the emulator as it was tested, and the commit that stands beside every measurement."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from benchmarks.support.measure import commit_of

ROOT = Path(__file__).parents[2]


def test_the_emulator_is_as_it_was_tested():
    """Its own tests take minutes and run when it changes: `make test-ptxsim` records what they passed with."""
    done = subprocess.run([sys.executable, ROOT / "tools" / "ptxsim" / "source_hash.py", "--check"])
    assert done.returncode == 0, "run `make test-ptxsim`"


def test_results_do_not_make_a_commit_dirty(tmp_path):
    """A run writes several files of results: the first one must not mark the second. Code that differs marks all."""

    def git(*arguments: str) -> str:
        author = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
        return subprocess.run(
            ["git", *author, *arguments], cwd=tmp_path, check=True, capture_output=True, text=True
        ).stdout.strip()

    code, result = tmp_path / "code.py", tmp_path / "benchmarks" / "results" / "first.csv"
    result.parent.mkdir(parents=True)
    code.write_text("1\n")
    result.write_text("1\n")
    assert commit_of(tmp_path) == "unknown"
    git("init", "-q")
    git("add", "-A")
    git("commit", "-q", "-m", "a commit")
    head = git("rev-parse", "--short", "HEAD")
    assert commit_of(tmp_path) == head
    result.write_text("2\n")
    (tmp_path / "untracked.txt").write_text("1\n")
    assert commit_of(result.parent) == head
    code.write_text("2\n")
    assert commit_of(tmp_path) == f"{head}-dirty"
