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

# The fault that each tool must find, and the words with which it does.
PLANTED = {
    "memcheck": ("write", "Invalid __global__ write"),
    "racecheck": ("race", "Race reported"),
    "initcheck": ("uninit", "Uninitialized __global__ memory read"),
    "synccheck": ("sync", "Barrier error"),
}
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


def clean(found: Sanitized, ours: frozenset[str] = frozenset()) -> Row:
    """Passed where the sanitizer came to its summary, found nothing, and the program's own checks passed too.

    ours: names of kernels, where hazards are told apart from those of libraries that run beside them.
    """
    if found.errors is None:
        return failed(f"the sanitizer did not come to a summary, exit code {found.code}:\n{found.end}")
    if found.code == FOUND and ours and not any(name in found.text for name in ours):
        return passed(f"{found.errors} hazards, all in kernels of libraries")
    words = f"{found.errors} errors, exit code {found.code}"
    return expect(found.errors == 0 and found.code == 0, words if found.code == 0 else f"{words}:\n{found.end}")


def planted(found: Sanitized, words: str) -> Row:
    """Passed where the fault was found, for what it is."""
    if found.errors and found.code == FOUND and words in found.text:
        return passed(f"found, {found.errors} errors")
    return failed(f"what was planted was not found: the other runs of this tool prove nothing.\n{found.end}")


def names_of(program: Sequence[str]) -> list[str]:
    """The cases that a check program lists, each a word on a line. Raises RuntimeError where it cannot."""
    done = subprocess.run([*program, "--list"], cwd=ROOT, capture_output=True, text=True)
    names = re.findall(r"^\S+$", done.stdout, re.M)
    if done.returncode or not names:
        raise RuntimeError(f"{' '.join(program)} --list ended with {done.returncode}: {done.stdout}{done.stderr}")
    return names


def triton_kernels() -> frozenset[str]:
    """The names of our kernels in Triton's language."""
    folder = ROOT / "loradash_kernels" / "backends" / "triton" / "kernels"
    return frozenset(name for f in folder.glob("*.py") for name in re.findall(r"^def (\w{5,})", f.read_text(), re.M))


def units(sanitizer: str, cuda_check: Path) -> Iterator[Unit]:
    """What is planted; Triton's checks, tool by tool; then every case of CUDA's."""
    cuda, triton = [str(cuda_check)], [sys.executable, str(TRITON_CHECK)]

    def run(tool: str, program: Sequence[str], ours: frozenset[str] = frozenset()) -> Row:
        return clean(sanitize(sanitizer, tool, program), ours)

    def plant(tool: str, program: Sequence[str], fault: str, words: str) -> Row:
        return planted(sanitize(sanitizer, tool, [*program, "--plant", fault]), words)

    for tool, (fault, words) in PLANTED.items():
        yield f"planted: {fault}, {tool}, cuda", functools.partial(plant, tool, cuda, fault, words)
    yield "planted: write, memcheck, triton", functools.partial(plant, "memcheck", triton, *PLANTED["memcheck"])
    for tool in PLANTED:
        # Libraries compute what Triton's results are compared with.
        ours = triton_kernels() if tool == "racecheck" else frozenset()
        yield f"{tool}: triton", functools.partial(run, tool, triton, ours)
    try:
        names = names_of(cuda)
    except (OSError, RuntimeError) as error:
        yield "cuda: list of cases", functools.partial(failed, str(error))
        return
    for tool in PLANTED:
        for name in names:
            yield f"{tool}: cuda, {name}", functools.partial(run, tool, [*cuda, "--only", name])


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
