"""Runs schemes of training as processes, and tells cell by cell how far they are from one process.

results = run_schemes(["fsdp2"], folder)
check(results["fsdp2"], "train")
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

CELLS = ("train", "launch", "save", "load", "export", "merge", "resume")
TESTS = Path(__file__).parents[1]

Result = dict[str, Any]
"""compared: what was, in words; gap and tolerance: numbers of one kind; error: the message where it came to none, or None."""


def run_schemes(
    schemes: Sequence[str] | Mapping[str, Sequence[str]],
    folder: Path,
    cells: Sequence[str] = CELLS,
    processes: int = 2,
    seconds: float = 600,
) -> dict[str, dict[str, Result]]:
    """Walks the cells of schemes that take as many processes, one after the other in one world: their own, or `cells`.

    Returns for every scheme its cells, the worst of all processes', and leaves them as FOLDER/SCHEME/result.json. What a
    process says before it dies is a cell's error.
    """
    folder.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    environment["PYTHONPATH"] = os.pathsep.join([str(TESTS), environment.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    walks = {name: list(schemes[name] if isinstance(schemes, Mapping) else cells) for name in schemes}
    program = [sys.executable, "-m", "support.scale_worker", json.dumps(walks), str(folder), str(processes)]
    with (folder / "output").open("w") as output:
        world = subprocess.Popen(
            program, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
    last = []
    try:
        world.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        last.append(f"the processes did not end in {seconds:g} s")
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(world.pid, signal.SIGKILL)
    if world.returncode != 0:
        last += [file.read_text()[-2000:] for file in sorted(folder.glob("output*"))]
    return {name: _merged(folder / name, cells, processes, "\n".join(last)) for name, cells in walks.items()}


def _merged(folder: Path, cells: Sequence[str], processes: int, last: str) -> dict[str, Result]:
    files = [folder / f"result.{rank}.json" for rank in range(processes)]
    found = [json.loads(file.read_text()) if file.is_file() else {} for file in files]
    lost = {"compared": "", "gap": math.inf, "tolerance": 0.0, "error": f"never came to an end: {last}"}
    merged = {cell: max((of.get(cell, lost) for of in found), key=badness) for cell in cells}
    folder.mkdir(exist_ok=True)
    (folder / "result.json").write_text(json.dumps(merged, indent=2))
    return merged


def badness(result: Result) -> float:
    """Above 1 where a cell failed."""
    if result["error"] is not None:
        return math.inf
    return result["gap"] / result["tolerance"] if result["tolerance"] else math.inf if result["gap"] else 0.0


def check(results: Mapping[str, Result], cell: str) -> None:
    """AssertionError where a cell is not as in one process."""
    result = results[cell]
    assert badness(result) <= 1, f"{cell}: {result['error'] or result}"
