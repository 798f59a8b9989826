"""What a sanitizer's output means: with pretended compute-sanitizers, and in the emulator, which must find what is planted."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from benchmarks.proof import emulated, sanitize
from benchmarks.proof.build import architectures

CLEAN = "========= COMPUTE-SANITIZER\n========= ERROR SUMMARY: 0 errors\n"
WRITE = "========= Invalid __global__ write of size 2 bytes\n========= ERROR SUMMARY: 1 error\n"
RACE = "========= Error: Race reported\n========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)\n"
NO_RACE = "========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)\n"
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
    ],
)
def test_clean(code, text, outcome):
    assert sanitize.clean(sanitize.read(code, text)).outcome == outcome


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
    row = sanitize.planted(sanitize.read(code, text))
    assert row.outcome == outcome
    assert bool(row.values.get("planted")) is (outcome == "passed")


PRETENDED = """#!{python}
import subprocess, sys
tool, program = sys.argv[2], sys.argv[5:]
assert sys.argv[1] == "--tool" and sys.argv[3:5] == ["--error-exitcode", "86"], sys.argv
code = subprocess.run(program).returncode
found = {finds} and ("--plant" in program or (tool, program[-1]) == ("racecheck", "b"))
print("========= Invalid __global__ write of size 2 bytes" if found else "")
print(f"========= ERROR SUMMARY: {{int(found)}} errors")
sys.exit(86 if found else code)
"""
CHECK = """#!{python}
import sys
if "--list" in sys.argv:
    print("a", "b", sep="\\n")
"""


@pytest.fixture
def programs(tmp_path):
    def write(name, text, **values):
        path = tmp_path / name
        path.write_text(text.format(python=sys.executable, **values))
        path.chmod(0o755)
        return path

    return write


def outcomes(sanitizer: Path, check: Path) -> dict[str, str]:
    units = sanitize.units(str(sanitizer), check)
    return {name: run().outcome for name, run in units if "triton" not in name}


def test_every_check_by_every_tool(programs):
    found = outcomes(programs("sanitizer", PRETENDED, finds=True), programs("check", CHECK))
    assert found == {
        "planted: memcheck, write": "passed",
        **{f"{tool}: cuda, {name}": "passed" for tool in sanitize.TOOLS for name in "ab"},
        "racecheck: cuda, b": "failed",
    }


def test_a_sanitizer_that_finds_nothing_fails(programs):
    found = outcomes(programs("sanitizer", PRETENDED, finds=False), programs("check", CHECK))
    assert found["planted: memcheck, write"] == "failed"


def test_a_program_that_lists_nothing_fails(programs):
    found = outcomes(programs("sanitizer", PRETENDED, finds=True), programs("check", "#!/bin/false\n"))
    assert found["cuda: list of checks"] == "failed"


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
    assert bool(row.values.get("planted")) is unit.startswith("planted")


def test_a_fault_that_is_not_planted_is_not_found():
    """The unit fails where nothing, or another fault, comes of what was run."""

    class Fault(Exception):
        kind = "deadlock"

    def fault():
        raise Fault

    assert emulated.expected_fault("deadlock", Fault, fault).outcome == "passed"
    assert emulated.expected_fault("out-of-bounds", Fault, fault).outcome == "failed"
    assert emulated.expected_fault("out-of-bounds", Fault, lambda: None).outcome == "failed"
