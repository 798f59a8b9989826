"""compute-sanitizer over the kernels: every check of cuda_check by every tool, and Triton's; and a planted fault first.

    python -m benchmarks.proof.sanitize --sanitizer PATH --cuda-check PATH [--lane 0/4]

A sanitizer that does not find the planted write out of bounds proves nothing, so that is a failure.
"""

from __future__ import annotations

import argparse
import functools
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from .ledger import Row
from .stage import ROOT
from .worker import Unit, expect, failed, passed, work

TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
# What compute-sanitizer is told to exit with where it found something: the checks themselves exit with 0 or 1.
FOUND = 86
TRITON_CHECK = ROOT / "examples" / "triton_check.py"
# Allocations that lie side by side in one block of PyTorch's cache hide what is written beyond one of them.
NO_CACHE = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}


@dataclass(frozen=True)
class Sanitized:
    """What a run under compute-sanitizer said. errors: None where it never came to its summary."""

    code: int
    errors: int | None
    text: str

    @property
    def end(self) -> str:
        return self.text[-3000:]


def read(code: int, text: str) -> Sanitized:
    """Takes the number out of "ERROR SUMMARY: 2 errors" or "RACECHECK SUMMARY: 1 hazard displayed (1 error, ...)"."""
    found = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: (\d+)", text)
    return Sanitized(code, int(found[-1]) if found else None, text)


def sanitize(sanitizer: str, tool: str, program: Sequence[str]) -> Sanitized:
    """Runs a program under a tool. One that hangs is for the proof's watchdog."""
    argv = [sanitizer, "--tool", tool, "--error-exitcode", str(FOUND), *program]
    done = subprocess.run(argv, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
    return read(done.returncode, done.stdout)


def clean(found: Sanitized) -> Row:
    """Passed where the sanitizer came to its summary, found nothing, and the program's own checks passed too."""
    if found.errors is None:
        return failed(f"the sanitizer did not come to a summary, exit code {found.code}:\n{found.end}")
    words = f"{found.errors} errors, exit code {found.code}"
    return expect(found.errors == 0 and found.code == 0, words if found.code == 0 else f"{words}:\n{found.end}")


def planted(found: Sanitized) -> Row:
    """Passed where the fault was found, for what it is."""
    if found.errors and found.code == FOUND and "Invalid __global__ write" in found.text:
        return passed(f"found, {found.errors} errors", planted="found")
    return failed(f"the planted write out of bounds was not found: the other runs prove nothing.\n{found.end}")


def names_of(program: Sequence[str]) -> list[str]:
    """What a check program lists. Raises RuntimeError where it cannot."""
    done = subprocess.run([*program, "--list"], cwd=ROOT, capture_output=True, text=True)
    names = [line.strip() for line in done.stdout.splitlines() if line.strip()]
    if done.returncode or not names:
        raise RuntimeError(f"{' '.join(program)} --list ended with {done.returncode}: {done.stdout}{done.stderr}")
    return names


def units(sanitizer: str, cuda_check: Path) -> Iterator[Unit]:
    """The planted write; then every check, tool by tool."""
    programs = {"cuda": [str(cuda_check)], "triton": [sys.executable, str(TRITON_CHECK)]}

    def run(tool: str, *program: str) -> Sanitized:
        return sanitize(sanitizer, tool, program)

    def checked(tool: str, argv: Sequence[str]) -> Row:
        return clean(run(tool, *argv))

    yield "planted: memcheck, write", lambda: planted(run("memcheck", str(cuda_check), "--plant", "write"))
    listed = []
    for kind, program in programs.items():
        try:
            listed += [(kind, program, name) for name in names_of(program)]
        except (OSError, RuntimeError) as error:
            yield f"{kind}: list of checks", functools.partial(failed, str(error))
    for tool in TOOLS:
        for kind, program, name in listed:
            argv = (*program, "--only", name)
            yield f"{tool}: {kind}, {name}", functools.partial(checked, tool, argv)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sanitizer", required=True)
    parser.add_argument("--cuda-check", type=Path, required=True)
    parser.add_argument("--lane", default="0/1")
    options = parser.parse_args()
    lane, lanes = map(int, options.lane.split("/"))
    found = units(options.sanitizer, options.cuda_check)
    return work((unit for place, unit in enumerate(found) if place % lanes == lane))


if __name__ == "__main__":
    sys.exit(main())
