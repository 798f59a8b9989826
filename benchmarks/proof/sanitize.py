"""compute-sanitizer over the kernels: every case of cuda_check by every tool, and Triton's; and a planted fault first.

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
# PyTorch and Triton ask the driver for functions that it need not have: to memcheck each such answer is an error.
NO_API_ERRORS = ("--report-api-errors", "no")
# Libraries compute what Triton's results are compared with. Some of their kernels let warps meet at barriers, or look at what
# others are about to write, as these tools do not allow; and by default no more than 100 findings are named, which would hide ours.
OF_LIBRARIES, ALL_OF_THEM = ("racecheck", "initcheck", "synccheck"), ("--print-limit", "100000")
# Not said of a kernel: memory that is copied before anything has written it.
COPIED = "Host API memory access error"


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


def sanitize(sanitizer: str, tool: str, program: Sequence[str], options: Sequence[str] = ()) -> Sanitized:
    """Runs a program under a tool. One that hangs is for the proof's watchdog."""
    argv = [sanitizer, "--tool", tool, "--error-exitcode", str(FOUND), *options, *program]
    done = subprocess.run(argv, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
    return read(done.returncode, done.stdout)


def ran(text: str) -> int | None:
    """How many cases a check program ran on the card, each of which it found right; None where it does not say so."""
    summary = re.findall(r"^(\d+) cases, (?:\d+ kernels, )?0 bad$", text, re.M)
    right = len(re.findall(r"^ok ", text, re.M))
    return right if right and summary == [str(right)] else None


def clean(found: Sanitized, ours: frozenset[str] = frozenset(), cases: int | None = None) -> Row:
    """Passed where the sanitizer came to its summary, found nothing, and the program's own checks passed too.

    ours: names of kernels, where what is found in them is told apart from what is in libraries. cases: how many the
    program must have run; a sanitizer that does not start it may end without an error, too.
    """
    if found.errors is None:
        return failed(f"the sanitizer did not come to a summary, exit code {found.code}:\n{found.end}")
    count = ran(found.text)
    if count is None or cases not in (None, count):
        return failed(f"{count} of {cases or 'its'} cases ran and were right, exit code {found.code}:\n{found.end}")
    if found.code == FOUND and ours and not any(name in found.text for name in (*ours, COPIED)):
        first = re.search(r"^=+ +(?:at|in) (.{,200})", found.text, re.M)
        return passed(
            f"{found.errors} findings, all in kernels of libraries; the first {first[0] if first else 'has no place'}"
        )
    words = f"{found.errors} errors in {count} cases, exit code {found.code}"
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


def groups_of(names: Sequence[str]) -> dict[str, int]:
    """Texts for --only that together choose every case, and how many each chooses: a process for each case would take longer
    to start than to run. A text is a name without its dtype and mask, unless another one chooses the same."""
    stems = {name.rsplit("-", 2)[0] for name in names}
    least = sorted(stem for stem in stems if not any(other in stem for other in stems - {stem}))
    return {stem: sum(stem in name for name in names) for stem in least}


def triton_kernels() -> frozenset[str]:
    """The names of our kernels in Triton's language."""
    folder = ROOT / "loradash_kernels" / "backends" / "triton" / "kernels"
    return frozenset(name for f in folder.glob("*.py") for name in re.findall(r"^def (\w{5,})", f.read_text(), re.M))


def units(sanitizer: str, cuda_check: Path) -> Iterator[Unit]:
    """What is planted; Triton's checks, tool by tool; then every case of CUDA's, some at a time."""
    cuda, triton = [str(cuda_check)], [sys.executable, str(TRITON_CHECK)]

    def options(tool: str, program: Sequence[str]) -> Sequence[str]:
        if program is cuda:
            return ()
        return ALL_OF_THEM if tool in OF_LIBRARIES else NO_API_ERRORS

    def run_triton(tool: str) -> Row:
        ours = triton_kernels() if tool in OF_LIBRARIES else frozenset()
        return clean(sanitize(sanitizer, tool, triton, options(tool, triton)), ours)

    def run_cuda(tool: str, text: str, cases: int) -> Row:
        return clean(sanitize(sanitizer, tool, [*cuda, "--only", text]), cases=cases)

    def plant(tool: str, program: Sequence[str], fault: str, words: str) -> Row:
        return planted(sanitize(sanitizer, tool, [*program, "--plant", fault], options(tool, program)), words)

    for tool, (fault, words) in PLANTED.items():
        yield f"planted: {fault}, {tool}, cuda", functools.partial(plant, tool, cuda, fault, words)
    yield "planted: write, memcheck, triton", functools.partial(plant, "memcheck", triton, *PLANTED["memcheck"])
    for tool in PLANTED:
        yield f"{tool}: triton", functools.partial(run_triton, tool)
    try:
        groups = groups_of(names_of(cuda))
    except (OSError, RuntimeError) as error:
        yield "cuda: list of cases", functools.partial(failed, str(error))
        return
    for tool in PLANTED:
        for text, cases in groups.items():
            yield f"{tool}: cuda, {text}", functools.partial(run_cuda, tool, text, cases)


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
