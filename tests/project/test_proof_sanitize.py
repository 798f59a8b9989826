"""What a sanitizer's output means: with pretended compute-sanitizers, and in the emulator, which must find what is planted."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from benchmarks.proof import emulated, sanitize
from benchmarks.proof.build import architectures

RAN = "ok one\nok two, at most 0.50 of what is allowed\n2 cases, 0 bad\n"
CLEAN = f"========= COMPUTE-SANITIZER\n{RAN}========= ERROR SUMMARY: 0 errors\n"
WRITE = f"========= Invalid __global__ write of size 2 bytes\n{RAN}========= ERROR SUMMARY: 1 error\n"
RACE = f"========= Error: Race reported\n{RAN}========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)\n"
NO_RACE = f"{RAN}========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)\n"
REFUSED = '========= Error: Device not supported. Please refer to the "Supported Devices" section\n'


@pytest.mark.parametrize(
    ("code", "text", "outcome"),
    [
        (0, CLEAN, "passed"),
        (0, NO_RACE, "passed"),
        (sanitize.FOUND, WRITE, "failed"),
        (sanitize.FOUND, RACE, "failed"),
        # The program's own check failed.
        (1, CLEAN, "failed"),
        # It never came to a summary, so nothing was sanitized.
        (0, "largest relative error 1e-3\n", "failed"),
        (1, REFUSED, "failed"),
        (-11, CLEAN, "failed"),
        # The program was never started, saw no card, ran nothing, or stopped midway.
        (0, CLEAN.replace(RAN, ""), "failed"),
        (0, CLEAN.replace(RAN, "no card: the launches that an A100 would take\none\ntwo\n2 cases, 0 bad\n"), "failed"),
        (0, CLEAN.replace(RAN, "0 cases, 0 bad\n"), "failed"),
        (0, CLEAN.replace("2 cases, 0 bad\n", ""), "failed"),
        (0, CLEAN.replace("ok two", "WRONG two"), "failed"),
    ],
)
def test_clean(code, text, outcome):
    assert sanitize.clean(sanitize.read(code, text)).outcome == outcome


def test_every_case_that_was_chosen_must_have_run():
    found = sanitize.read(0, CLEAN)
    assert sanitize.clean(found, cases=2).outcome == "passed"
    assert sanitize.clean(found, cases=3).outcome == "failed"
    assert sanitize.ran("ok a\n1 cases, 5 kernels, 0 bad\n") == 1


def test_cases_share_processes():
    """Each name contains one of the texts, and the counts are what --only will choose."""
    names = ["64x64-rows-bf16-whole", "64x64-rows-f16-whole", "one_launch_64x64-rows-f16-whole", "a-row-bf16-dropout"]
    assert sanitize.groups_of(names) == {"64x64-rows": 3, "a-row": 1}
    assert sanitize.groups_of(["a", "b"]) == {"a": 1, "b": 1}


def test_findings_in_libraries_are_told_apart():
    found = sanitize.read(sanitize.FOUND, f"{RACE}=========     at void cutlass_80_tensorop_s1688gemm")
    assert sanitize.clean(found).outcome == "failed"
    row = sanitize.clean(found, sanitize.triton_kernels())
    assert (
        row.outcome == "passed"
        and "1 findings, all in kernels of libraries" in row.detail
        and "s1688gemm" in row.detail
    )
    copied = sanitize.read(sanitize.FOUND, f"========= {sanitize.COPIED}\n{CLEAN.replace('0 errors', '1 error')}")
    assert sanitize.clean(copied, sanitize.triton_kernels()).outcome == "failed"
    ours = sanitize.read(sanitize.FOUND, f"{RACE}in extended_gemm")
    assert sanitize.clean(ours, sanitize.triton_kernels()).outcome == "failed"
    assert sanitize.clean(sanitize.read(1, CLEAN), sanitize.triton_kernels()).outcome == "failed"


@pytest.mark.parametrize(
    ("code", "text", "outcome"),
    [
        (sanitize.FOUND, WRITE, "passed"),
        (0, CLEAN, "failed"),
        # Something was found, but not what was planted.
        (sanitize.FOUND, WRITE.replace("write", "read"), "failed"),
        (sanitize.FOUND, RACE, "failed"),
        (1, REFUSED, "failed"),
    ],
)
def test_planted(code, text, outcome):
    assert sanitize.planted(sanitize.read(code, text), "Invalid __global__ write").outcome == outcome


PRETENDED = """#!{python}
import subprocess, sys
tool, program = sys.argv[2], sys.argv[5:]
assert sys.argv[1] == "--tool" and sys.argv[3:5] == ["--error-exitcode", "86"], sys.argv
extra = ["--report-api-errors", "no"] if tool == "memcheck" else ["--print-limit", "100000"]
code, triton = 0, "triton_check" in " ".join(program)
if triton:
    assert program[:len(extra)] == extra, program
    print("ok x", "1 cases, 2 kernels, 0 bad", sep="\\n")
else:
    assert program[0][0] != "-", program
    code = subprocess.run(program).returncode
found = {finds} and ("--plant" in program or (tool, program[-1]) == ("racecheck", "b"))
words = {words!r}[tool][1]
print(f"========= {{words}} of size 2 bytes" if found else "")
print(f"========= ERROR SUMMARY: {{int(found)}} errors")
sys.exit(86 if found else code)
"""
# As cuda_check lists: cases, and below each its launches.
CHECK = """#!{python}
import sys
if "--list" in sys.argv:
    print("a", "  kernel 1 1 1 threads 128", "b", "2 cases, 0 bad", sep="\\n")
if "--only" in sys.argv:
    print("ok x", "1 cases, 0 bad", sep="\\n", flush=True)
"""


@pytest.fixture
def programs(tmp_path):
    def write(name, text, **values):
        path = tmp_path / name
        path.write_text(text.format(python=sys.executable, words=sanitize.PLANTED, **values))
        path.chmod(0o755)
        return path

    return write


def outcomes(sanitizer: Path, check: Path) -> dict[str, str]:
    return {name: run().outcome for name, run in sanitize.units(str(sanitizer), check)}


TRITON = {f"{tool}: triton" for tool in sanitize.PLANTED}
PLANTED = {f"planted: {fault}, {tool}, cuda" for tool, (fault, _) in sanitize.PLANTED.items()}
PLANTED.add("planted: write, memcheck, triton")


def test_every_case_by_every_tool(programs):
    found = outcomes(programs("sanitizer", PRETENDED, finds=True), programs("check", CHECK))
    cases = {f"{tool}: cuda, {name}" for tool in sanitize.PLANTED for name in "ab"}
    assert {*found} == PLANTED | TRITON | cases
    assert {name for name, outcome in found.items() if outcome != "passed"} == {"racecheck: cuda, b"}


def test_a_sanitizer_that_finds_nothing_fails(programs):
    found = outcomes(programs("sanitizer", PRETENDED, finds=False), programs("check", CHECK))
    assert {name for name, outcome in found.items() if outcome == "failed"} == PLANTED


def test_a_program_that_lists_nothing_fails(programs):
    found = outcomes(programs("sanitizer", PRETENDED, finds=True), programs("check", "#!/bin/false\n"))
    assert found["cuda: list of cases"] == "failed"


@pytest.mark.parametrize(
    ("capability", "expected"),
    [((8, 0), "8.0"), ((8, 6), "8.0;8.6"), ((8, 9), "8.0;8.9"), ((9, 0), "8.0+PTX;9.0"), ((12, 0), "8.0+PTX;12.0")],
)
def test_architectures(capability, expected):
    """A card runs the machine code of its own generation; that of an older one it must compile."""
    assert architectures(capability) == expected


@pytest.mark.parametrize("unit", [name for name, _ in emulated.units()])
def test_the_emulator_finds_what_is_planted(unit):
    row = dict(emulated.units())[unit]()
    if row.outcome == "missing":
        pytest.skip(row.detail)
    assert row.outcome == "passed", row.detail


def test_a_fault_that_is_not_planted_is_not_found():
    """The unit fails where nothing, or another fault, comes of what was run."""

    class Fault(Exception):
        kind = "deadlock"

    def fault():
        raise Fault

    assert emulated.expected_fault("deadlock", Fault, fault).outcome == "passed"
    assert emulated.expected_fault("out-of-bounds", Fault, fault).outcome == "failed"
    assert emulated.expected_fault("out-of-bounds", Fault, lambda: None).outcome == "failed"
