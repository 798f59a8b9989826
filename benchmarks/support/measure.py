"""Timing: variants in turn, in blocks, within one process; medians. And what is written beside every number."""

from __future__ import annotations

import csv
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

import loradash_kernels


def interleaved(
    steps: Mapping[str, Callable[[], object]],
    rounds: int,
    per_block: int,
    warm: int = 2,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, float]:
    """Median seconds of every step: `rounds` rounds of one block each, whose first `warm` calls do not count."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for round_ in range(rounds + 1):
        for name, step in steps.items():
            for _ in range(warm):
                step()
            for _ in range(per_block):
                start = clock()
                step()
                if round_:
                    times[name].append(clock() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def environment() -> dict[str, str]:
    """Machine, versions and commit."""
    cpu = next(
        (line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")),
        platform.processor(),
    )
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, cwd=Path(__file__).parent
    )
    from loradash_kernels.backends import extension

    isa = "/".join(extension.compiled().isa(i) for i in range(3)) if extension.is_compiled() else "reference"
    return {
        "cpu": cpu,
        "isa (fp32/bf16/fp16)": isa,
        "threads": str(torch.get_num_threads()),
        "torch": torch.__version__,
        "loradash": loradash_kernels.__version__,
        "commit": commit.stdout.strip() or "unknown",
    }


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    """One line a row, the environment in every line."""
    about = environment()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=[*rows[0], *about])
        writer.writeheader()
        writer.writerows([{**row, **about} for row in rows])
