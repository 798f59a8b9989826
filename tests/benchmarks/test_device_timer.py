"""pytest-benchmark with a timer whose stamps subtract to the device's seconds, on a fake clock."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from support.stopwatches import FakeStopwatch

from benchmarks.support.device_timer import DeviceTimer

ROOT = Path(__file__).parents[2]


def test_stamps_subtract_to_the_seconds_in_between():
    watch = FakeStopwatch(flush=100.0, spin=1000.0)
    timer = DeviceTimer(watch)
    start = timer()
    assert watch.events[-3:] == ["flush", "spin", "stamp"]
    watch.now += 250.0
    assert timer() - start == 0.25


MODULE = """
import pytest
from support.stopwatches import FakeStopwatch
from benchmarks.support.device_timer import DeviceTimer

WATCH = FakeStopwatch(flush=100.0, spin=1000.0)

@pytest.mark.benchmark(timer=DeviceTimer(WATCH))
def test_it(benchmark):
    def call():
        WATCH.now += 3.0
    def setup():
        WATCH.now += 5000.0
    benchmark.pedantic(call, setup=setup, rounds=4, warmup_rounds=1)
"""


def test_pedantic_takes_it(tmp_path):
    (tmp_path / "test_timed.py").write_text(MODULE)
    out = tmp_path / "out.json"
    options = ["--benchmark-enable", f"--benchmark-json={out}"]
    # In a process of pytest-xdist nothing would be measured.
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-c",
            "/dev/null",
            "--rootdir",
            tmp_path,
            *options,
            tmp_path / "test_timed.py",
        ],
        env={**inherited, "PYTHONPATH": os.pathsep.join([str(ROOT / "tests"), str(ROOT), *sys.path])},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-2000:]
    stats = json.loads(out.read_text())["benchmarks"][0]["stats"]
    assert stats["rounds"] == 4 and abs(stats["median"] - 0.003) < 1e-12
