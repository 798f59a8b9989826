"""Timing: variants in turn, in blocks, within one process; medians. And what is written beside every number."""

from __future__ import annotations

import csv
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import loradash_kernels
from loradash_kernels.backends import extension

ROOT = Path(__file__).parents[2]
RESULTS = "benchmarks/results"


def commit_of(repository: Path) -> str:
    """The short hash of a repository's HEAD, with -dirty where a tracked file outside benchmarks/results differs from it.

    Results do not count: the first file that a run writes would mark the second one.
    """

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], capture_output=True, text=True, cwd=repository).stdout.strip()

    try:
        commit = git("rev-parse", "--short", "HEAD")
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ":/", f":(top,exclude){RESULTS}")
    except FileNotFoundError:
        return "unknown"
    return f"{commit}{'-dirty' if changed else ''}" if commit else "unknown"


# The commit belongs to the code that was loaded, so it is taken once, when the program starts.
COMMIT = commit_of(ROOT)


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


def wanted_device(name: str | None) -> torch.device:
    """The named device, or the card where there is one. RuntimeError in words where the named card is not there."""
    device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda" and not torch.cuda.is_available():
        raise RuntimeError(f"--device {name}: PyTorch {torch.__version__} sees no GPU")
    return device


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def environment() -> dict[str, str]:
    """Machine, versions and commit."""
    isa = "/".join(extension.compiled().isa(i) for i in range(3)) if extension.is_compiled() else "reference"
    return {
        "cpu": _cpu(),
        "isa (fp32/bf16/fp16)": isa,
        "threads": str(torch.get_num_threads()),
        "torch": torch.__version__,
        "loradash": loradash_kernels.__version__,
        "commit": COMMIT,
    }


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    """One line a row, the environment in every line."""
    about = environment()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=[*rows[0], *about])
        writer.writeheader()
        writer.writerows([{**row, **about} for row in rows])


def saved_bytes(forward: Callable[[], Tensor], known: Iterable[Tensor]) -> int:
    """Bytes that a forward pass keeps for backward, beside tensors that are there anyway: inputs, parameters, buffers."""
    there = {t.untyped_storage().data_ptr() for t in known}
    seen: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in there:
            seen[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = forward()
    del y
    return sum(seen.values())
