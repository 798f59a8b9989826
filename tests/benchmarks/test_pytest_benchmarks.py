"""`pytest benchmarks`: where it runs, and with which timer."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
# A plugin that pretends a card, and says which timer a benchmark got.
CARD = """
import torch
from loradash_kernels import timing

torch.cuda.is_available = lambda: True
torch.cuda.get_device_name = lambda device: "a pretended card"
timing.stopwatch_for = lambda device: timing.HostStopwatch()

def pytest_collection_finish(session):
    markers = {marker.kwargs["timer"].__name__ for item in session.items for marker in item.iter_markers("benchmark")}
    print("timers:", markers)
"""


def collect(tmp_path, *arguments, card=False):
    (tmp_path / "pretended_card.py").write_text(CARD)
    options = ["-p", "pretended_card"] if card else []
    return subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "benchmarks",
            "--collect-only",
            "-p",
            "no:cacheprovider",
            *options,
            *arguments,
        ],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])},
        capture_output=True,
        text=True,
    )


def test_the_card_where_there_is_one(tmp_path):
    done = collect(tmp_path, card=True)
    assert done.returncode == 0, done.stdout[-2000:]
    assert "benchmarks on a pretended card" in done.stdout and "timers: {'device events'}" in done.stdout
    assert "4096x4096x4096" in done.stdout and "512x1024x1024" not in done.stdout


def test_the_cpu_where_it_is_asked_for(tmp_path):
    done = collect(tmp_path, "--device", "cpu", card=True)
    assert "benchmarks on cpu" in done.stdout and "timers: set()" in done.stdout
    assert "512x1024x1024" in done.stdout and "4096x4096x4096" not in done.stdout


def test_a_card_that_is_not_there(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a card")
    done = collect(tmp_path, "--device", "cuda")
    assert done.returncode == pytest.ExitCode.USAGE_ERROR and "sees no GPU" in done.stderr
