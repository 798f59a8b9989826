"""The program that measures a device, rehearsed on the CPU: its rows, its checks, and that it can be cut and started again."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from benchmarks.layers import device as program
from benchmarks.layers.backends import PASSES
from benchmarks.layers.device_report import main as report_main
from benchmarks.layers.device_report import report
from benchmarks.layers.meter import CardLost, Meter
from benchmarks.layers.variants import FROZEN, IN_PLACE, OURS, PEFT, VARIANTS
from benchmarks.layers.workloads import Job, Workload
from benchmarks.support.journal import ATTEMPTS, Journal, read_lines
from loradash_kernels.timing import HostStopwatch

ROOT = Path(__file__).parents[2]
WORKLOAD = Workload("fp32", 24, 32, 40, rank=4)
LAYER, STRATEGY = Job("layer", WORKLOAD), Job("strategy", WORKLOAD)


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Runs a rehearsal of given jobs, and returns the exit status and the rows by arm."""
    monkeypatch.setattr(program, "VARIANTS", (FROZEN, PEFT, IN_PLACE, OURS))

    def go(*jobs, arguments=()):
        monkeypatch.setattr(program, "rehearsal", lambda: list(jobs))
        status = program.main(["--rehearse", "--out", str(tmp_path), *arguments])
        return status, {row["arm"]: row for row in read_lines(tmp_path / "rows.jsonl")}

    return go


def test_a_layer_has_a_row_for_every_arm(run, capsys, monkeypatch):
    monkeypatch.setattr(program, "VARIANTS", VARIANTS)
    status, rows = run(LAYER)
    assert status == 0
    assert rows.keys() == {*VARIANTS, f"{OURS}, cpu", f"{OURS}, reference", "vendor GEMM"}
    assert all(row["error"] is None for row in rows.values())
    ours = rows[OURS]
    assert ours["key"] == f"layer/{WORKLOAD}/ours"
    assert (ours["M"], ours["K"], ours["N"], ours["r"], ours["dropout"]) == (24, 32, 40, 4, 0.05)
    for time_ in ("forward", "backward", "step", "wall"):
        assert ours[f"{time_} ms"] > 0 and ours[f"{time_} ratio"] > 0 and ours[f"{time_} over ours"] == 1.0
    assert ours["graph ms"] is None and ours["why null"] == {"graph": "a CUDA graph needs a card"}
    assert ours["saved bytes"] > rows[FROZEN]["saved bytes"] == 0
    assert {"card", "power", "SM clock", "throttled", "torch", "commit"} <= ours.keys() and ours["rehearsed"]
    said = capsys.readouterr().out
    assert f"1/1 {LAYER}: 10 rows" in said and "ours: passed" in said


def test_rows_that_are_there_are_not_measured_again(run, monkeypatch):
    _, before = run(LAYER)

    def measured(*args, **kwargs):
        raise AssertionError("this was measured before")

    monkeypatch.setattr(Meter, "measure", measured)
    assert run(LAYER) == (0, before)


def test_what_is_missing_is_measured_beside_the_frozen_layer(run, tmp_path):
    _, before = run(LAYER)
    kept = [row for arm, row in before.items() if arm != IN_PLACE]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept))
    _, after = run(LAYER)
    assert after[IN_PLACE]["step ratio"] > 0
    assert {arm: row for arm, row in after.items() if arm != IN_PLACE} == {row["arm"]: row for row in kept}


def test_an_arm_that_is_wrong_gets_no_time(run, monkeypatch):
    made = program.make_case

    def wrong(name, *args):
        case = made(name, *args)
        if name == PEFT:
            case.layer.scaling["default"] *= 1.5
        return case

    monkeypatch.setattr(program, "make_case", wrong)
    status, rows = run(LAYER)
    assert status == 0 and rows[PEFT]["error"].startswith("AssertionError") and "step ms" not in rows[PEFT]
    assert rows[OURS]["error"] is None


def test_out_of_memory_is_a_row_that_says_so(run, monkeypatch):
    made = program.make_case

    def greedy(name, *args):
        if name == PEFT:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 98.00 GiB")
        return made(name, *args)

    monkeypatch.setattr(program, "make_case", greedy)
    _, rows = run(LAYER)
    assert rows[PEFT]["error"] is None
    assert rows[PEFT]["left out"] == "OutOfMemoryError: CUDA out of memory. Tried to allocate 98.00 GiB"
    assert rows[IN_PLACE]["error"] is None


def test_inputs_that_find_no_room_end_their_job_alone(run, monkeypatch):
    def greedy(*args):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 98.00 GiB")

    with monkeypatch.context() as patched:
        patched.setattr(program, "make_inputs", greedy)
        status, rows = run(LAYER, Job("roofs"))
    assert status == 0 and rows[program.WHOLE]["left out"].startswith("OutOfMemoryError") and "empty launch" in rows
    assert run(LAYER)[1] == rows, "it is not tried again"


def test_the_card_is_asked_how_it_is_while_it_works(tmp_path, monkeypatch):
    measured = program.Program(Meter(torch.device("cpu"), HostStopwatch()), Journal(tmp_path), True)
    worked = threading.Event()
    monkeypatch.setattr(program, "card_facts", lambda device: {"power": "700 W" if worked.wait(30) else "idle"})
    measured._look(worked.set)
    assert measured.facts == {"power": "700 W", "late calls": 0}


def test_what_a_backend_refuses_is_no_failure(run, monkeypatch):
    refuses = program.backends.refusal
    monkeypatch.setattr(
        program.backends, "refusal", lambda name, *args: "x is too small" if name == "cpu" else refuses(name, *args)
    )
    _, rows = run(LAYER, STRATEGY)
    row = rows[f"{OURS}, cpu"]
    assert (row["error"], row["left out"]) == (None, "refused: x is too small") and "step ms" not in row
    assert "cpu" not in rows and "reference" in rows


def test_a_card_that_no_longer_answers_ends_the_program_and_then_the_arm(run, monkeypatch, tmp_path):
    made = program.make_case

    def deadly(name, *args):
        if name == PEFT:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return made(name, *args)

    def lost(self, arm, why):
        raise CardLost(arm, why)

    with monkeypatch.context() as patched:
        patched.setattr(program, "make_case", deadly)
        patched.setattr(Meter, "recover", lost)
        status, rows = run(LAYER)
    assert status == program.CARD_IS_LOST and rows.keys() == {PEFT}
    status, rows = run(LAYER)
    assert status == 0 and "illegal memory access" in rows[PEFT]["error"] and rows[OURS]["error"] is None


def test_a_card_that_is_lost_while_an_arm_is_timed(run, monkeypatch):
    measured = Meter.measure

    def deadly(self, arms, *args, **kwargs):
        if PEFT in arms:
            raise CardLost(PEFT, "AcceleratorError: unspecified launch failure")
        return measured(self, arms, *args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(Meter, "measure", deadly)
        assert run(LAYER)[0] == program.CARD_IS_LOST
    status, rows = run(LAYER)
    assert status == 0 and "unspecified launch failure" in rows[PEFT]["error"] and rows[OURS]["step ms"] > 0


def test_an_arm_that_fails_wherever_it_is_timed_has_failed(run, monkeypatch):
    measured = Meter.measure

    def failing(self, arms, *args, **kwargs):
        found = measured(self, {name: arm for name, arm in arms.items() if name != PEFT}, *args, **kwargs)
        found.errors[PEFT] = "RuntimeError: no"
        return found

    monkeypatch.setattr(Meter, "measure", failing)
    _, rows = run(LAYER)
    assert rows[PEFT]["error"] == "RuntimeError: no" and rows[PEFT]["step ms"] is None
    assert rows[OURS]["error"] is None


def test_nothing_stands_beside_a_frozen_layer_that_failed(run, tmp_path):
    Journal(tmp_path).add({"key": program.key_of(LAYER, FROZEN), "arm": FROZEN, "error": "lost", "card": "none, cpu"})
    Journal(tmp_path).add({"key": program.key_of(STRATEGY, OURS), "arm": OURS, "error": "lost", "card": "none, cpu"})
    program.run_jobs(
        program.Program(Meter(torch.device("cpu"), HostStopwatch()), Journal(tmp_path), True), [LAYER, STRATEGY]
    )
    assert len(read_lines(tmp_path / "rows.jsonl")) == 2


def test_an_arm_that_hung_twice_is_left_out(run, tmp_path):
    for _ in range(ATTEMPTS):
        Journal(tmp_path).begin(program.key_of(LAYER, PEFT))
    _, rows = run(LAYER)
    assert "hung the program" in rows[PEFT]["error"] and rows[OURS]["error"] is None


def test_the_time_is_over(run, capsys):
    status, rows = run(LAYER, STRATEGY, arguments=["--seconds", "0"])
    assert status == program.TIME_IS_OVER and rows == {}
    assert "2 jobs are left, from layer/" in capsys.readouterr().out


def test_time_that_is_over_within_a_job_leaves_strategies_for_later(run, monkeypatch):
    checked = program.Program._check

    def slow(self, *args):
        self.seconds = self.spent
        return checked(self, *args)

    with monkeypatch.context() as patched:
        patched.setattr(program.Program, "_check", slow)
        status, rows = run(STRATEGY)
    assert status == program.TIME_IS_OVER and rows == {}
    assert run(STRATEGY)[0] == 0


def test_strategies_are_timed_beside_ours(run):
    _, rows = run(STRATEGY)
    assert rows.keys() == {"cpu", "reference"}
    for row in rows.values():
        assert row["forward over ours"] > 0 and row["backward ratio"] > 0 and "step ms" not in row


def test_roofs_training_and_prelaunch(run):
    status, rows = run(Job("roofs"), Job("training"), Job("prelaunch", shape=(64, 96)))
    assert status == 0 and all(row["error"] is None for row in rows.values())
    assert {"empty launch", "copy of 1 MiB", "bf16 product 64 cubed"} <= rows.keys()
    for arm in (FROZEN, PEFT, OURS):
        assert rows[arm]["tokens/s"] > 0 and "1 layers of 64" in rows[arm]["stack"]
    directions = rows["directions of 64x96"]
    assert directions["svd ms"] > 0 and directions["top 8 found"] >= 0.9


def test_rows_of_another_card_are_not_mixed(run, tmp_path):
    Journal(tmp_path).add({"key": "a", "card": "NVIDIA A100"})
    with pytest.raises(SystemExit, match="holds rows of NVIDIA A100; this is none, cpu"):
        run(LAYER)


def test_a_card_that_is_not_there(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        program.main(["--device", "cuda", "--out", "nowhere"])
    assert "sees no GPU" in capsys.readouterr().err


def test_a_cpu_must_be_asked_for(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        program.main(["--out", "nowhere"])
    assert "--rehearse shows on a CPU" in capsys.readouterr().err


def test_a_shape_that_is_not_there(capsys):
    with pytest.raises(SystemExit):
        program.main(["--rehearse", "--shapes", "5x7", "--out", "nowhere"])
    assert "nothing is of 5x7" in capsys.readouterr().err


def test_the_report(run, tmp_path, capsys, monkeypatch):
    pytest.importorskip("matplotlib")
    run(LAYER, STRATEGY, Job("roofs"))
    found = report(tmp_path)
    assert found["beside peers"].numbers and found["beside our best"].numbers
    text = (tmp_path / "device.md").read_text()
    assert "A rehearsal on tiny sizes" in text and f"{OURS}, reference" in text and "empty launch" in text
    assert (tmp_path / "device.png").read_bytes().startswith(b"\x89PNG")
    lines = (tmp_path / "device.csv").read_text().splitlines()
    assert len(lines) == 1 + len(read_lines(tmp_path / "rows.jsonl")) and "power limit" in lines[0]
    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", ["device_report", str(tmp_path)])
    report_main()
    assert "beside peers: ours by default takes at most 1.03" in capsys.readouterr().out


def test_a_report_of_nothing(tmp_path):
    with pytest.raises(ValueError, match=r"rows\.jsonl holds no rows"):
        report(tmp_path)


INTERPRETED = """
import json
import sys

from benchmarks.layers import device as program
from benchmarks.layers.workloads import Job, Workload
from loradash_kernels.backends import tuning

chosen, choose = set(), tuning.choose

def recorded(owner, call, *args):
    found = choose(owner, call, *args)
    chosen.add((owner, call.pass_, str(found)))
    return found

tuning.choose = recorded
program.rehearsal = lambda: [Job("strategy", Workload("fp32", 64, 64, 96))]
status = program.main(["--rehearse", "--out", sys.argv[1]])
print(json.dumps(sorted(chosen)))
sys.exit(status)
"""


@pytest.mark.slow
def test_every_strategy_of_triton_in_its_interpreter(tmp_path):
    """Each is checked by the error rule and timed in the passes that it is a candidate of, and is what ran."""
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    command = [sys.executable, "-c", INTERPRETED, str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = {row["arm"]: row for row in read_lines(tmp_path / "rows.jsonl")}
    kinds = {arm.split()[1] for arm in rows if arm.startswith("triton ")}
    assert kinds == {"fused", "one_launch", "library"}
    for arm, row in rows.items():
        assert row["error"] is None and row["forward ms"] > 0, arm
        assert (row["backward ms"] is None) == ("one_launch" in arm)
    chosen = json.loads(done.stdout.splitlines()[-1])
    strategies = {
        pass_: {s for owner, p, s in chosen if (owner, p) == ("triton", pass_) and s != "None"} for pass_ in PASSES
    }
    timed = {
        pass_: sum(arm.startswith("triton ") and bool(r[f"{pass_} ms"]) for arm, r in rows.items()) for pass_ in PASSES
    }
    assert {pass_: len(found) for pass_, found in strategies.items()} == timed
