"""Stages of the proof: budgets, crashes, hangs, cuts and what goes on after them, with toy stages that run in an instant."""

from __future__ import annotations

import io
import os
import signal
import sys
import threading
import time
from dataclasses import replace

import pytest

from benchmarks.proof.ledger import Ledger, Row
from benchmarks.proof.schedule import Call, run_stage, run_stages
from benchmarks.proof.screen import Screen
from benchmarks.proof.stage import ROOT, Command, Context, Missing, Stage
from benchmarks.proof.state import State

# Units by name; each leaves a line in a file, so that a test sees what ran, and how often.
PROGRAM = """
import os, signal, sys, time
from pathlib import Path
from benchmarks.proof.worker import expect, missing, passed, work

def unit(name):
    def run():
        with open({trace!r}, "a") as file:
            file.write(name + "\\n")
        kind = name.split("-")[0]
        if kind == "segfault":
            os.kill(os.getpid(), signal.SIGSEGV)
        if kind == "exit":
            os._exit(9)
        if kind == "hang":
            time.sleep(600)
        if kind == "broken":
            from benchmarks.proof.ledger import Row
            from benchmarks.proof.worker import LEDGER, START_AGAIN
            from benchmarks.proof.ledger import Ledger
            Ledger(Path(os.environ[LEDGER])).finish(Row(name, "failed", detail="the context is broken"))
            os._exit(START_AGAIN)
        if kind == "slow":
            time.sleep(0.4)
        if kind == "raise":
            raise ValueError("told in words")
        return missing("no reason") if kind == "missing" else expect(kind != "wrong", "a detail")
    return name, run

lane, lanes = {lane}, {lanes}
sys.exit(work([unit(name) for name in {names!r}][lane::lanes]))
"""


@pytest.fixture
def trace(tmp_path):
    return tmp_path / "trace"


@pytest.fixture
def call(tmp_path):
    folder = tmp_path / "state"
    return Call(Context(folder, {}), State(folder), Screen(io.StringIO()))


def toy(trace, *names, budget=60.0, lanes=1, **options) -> Stage:
    def command(context, turn):
        code = PROGRAM.format(trace=str(trace), names=names, lane=turn.lane, lanes=turn.lanes)
        return Command([sys.executable, "-c", code])

    return Stage("toy", budget, budget, command, lanes=lambda context: lanes, **{"least": 0.2, **options})


def outcomes(call) -> dict[str, str]:
    return {row.name: row.outcome for row in call.context.rows("toy")}


def details(call) -> dict[str, str]:
    return {row.name: row.detail for row in call.context.rows("toy")}


def test_all_units_pass(call, trace):
    record = run_stage(call, toy(trace, "a", "b"))
    assert (record.ending, record.detail, record.starts) == ("passed", "2 passed", 1)
    assert State(call.context.folder).load().records["toy"] == record


@pytest.mark.parametrize("unit", ["wrong", "raise"])
def test_one_failure_fails_the_stage(call, trace, unit):
    assert run_stage(call, toy(trace, "a", unit, "b")).ending == "failed"
    assert outcomes(call) == {"a": "passed", unit: "failed", "b": "passed"}


def test_what_is_missing_is_no_pass(call, trace):
    record = run_stage(call, toy(trace, "missing", "missing-2"))
    assert record.ending == "missing"
    none = Stage("toy", 60, 60, lambda context, turn: Missing("no compiler was found"))
    record = run_stage(call, none)
    assert record.ending == "missing" and "no compiler was found" in record.detail


@pytest.mark.parametrize(("unit", "words"), [("segfault", "crashed: SIGSEGV"), ("exit", "exit code 9")])
def test_a_crash_is_its_units_failure_and_the_rest_goes_on(call, trace, unit, words):
    record = run_stage(call, toy(trace, "a", unit, "b"))
    assert (record.ending, record.starts) == ("failed", 2)
    assert outcomes(call) == {"a": "passed", unit: "failed", "b": "passed"}
    assert words in details(call)[unit]
    assert trace.read_text().split() == ["a", unit, "b"]


def test_a_hang_is_its_units_failure_and_the_rest_goes_on(call, trace):
    record = run_stage(call, toy(trace, "a", "hang", "b", patience=6))
    assert record.ending == "failed"
    assert outcomes(call) == {"a": "passed", "hang": "failed", "b": "passed"}
    assert "it hung" in details(call)["hang"]


def test_a_broken_device_starts_a_new_process(call, trace):
    run_stage(call, toy(trace, "broken", "b"))
    assert outcomes(call) == {"broken": "failed", "b": "passed"}
    assert details(call)["broken"] == "the context is broken"


def test_a_stage_that_hangs_is_killed_within_its_budget(call, trace):
    record = run_stage(call, toy(trace, "a", "hang", "b", budget=4))
    assert record.ending == "over" and "time was up" in record.detail and record.seconds < 60
    assert outcomes(call).items() <= {"a": "passed"}.items()


def test_an_elastic_stage_is_through_when_its_budget_is_used(call, trace):
    record = run_stage(call, toy(trace, "a", "hang", "b", budget=8, elastic=True))
    assert record.ending == "passed" and "as much as fits" in record.detail
    # Nothing at all is no pass, however little time there was.
    assert run_stage(call, toy(trace, "hang", budget=4, elastic=True)).ending == "failed"


def test_a_stage_that_does_nothing_fails(call):
    def stage(code):
        return Stage("toy", 60, 60, lambda context, turn: Command([sys.executable, "-c", code]))

    assert run_stage(call, stage("")).ending == "failed"
    record = run_stage(call, stage("raise SystemExit('the sky fell')"))
    assert record.ending == "failed" and "no result" in record.detail and "the sky fell" in record.detail
    record = run_stage(call, stage("import os; os.abort()"))
    assert "crashed: SIGABRT" in record.detail


def test_a_cut_call_goes_on_and_repeats_nothing(call, trace):
    names = [f"slow-{i}" for i in range(18)]
    stage = toy(trace, *names, budget=600)
    starts = 0
    while True:
        call.end = time.monotonic() + 6
        if (record := run_stage(call, stage)).ending != "cut":
            break
        assert "the next one goes on" in record.detail and len(outcomes(call)) < len(names)
        starts += 1
        assert starts < 60
    assert starts and record.ending == "passed" and record.starts == starts + 1
    # Nothing that ended was begun again: what was killed in the middle may have been.
    assert {*trace.read_text().split()} == {*names} == {*outcomes(call)}
    ledger = (call.context.of("toy") / "rows-0.jsonl").read_text()
    assert all(ledger.count(f'"row": {{"name": "{name}"') == 1 for name in names)


def test_more_time_for_a_stage_whose_time_was_up_lets_it_go_on(call, trace):
    names = [f"slow-{i}" for i in range(60)]
    assert run_stage(call, toy(trace, *names, budget=6)).ending == "over"
    before = {*outcomes(call)}
    assert before < {*names}
    assert run_stages(call, [toy(trace, *names, budget=6)]) and {*outcomes(call)} == before
    call.budgets["toy"] = 600
    assert run_stages(call, [toy(trace, *names, budget=6)]) and call.state.records["toy"].ending == "passed"
    assert {*outcomes(call)} == {*names} and all(trace.read_text().split().count(name) == 1 for name in before)


def test_a_call_without_time_begins_nothing(call, trace):
    call.end = time.monotonic()
    assert run_stage(call, toy(trace, "a")).ending == "cut" and not trace.exists()


def test_finished_stages_are_not_repeated(call, trace):
    stages = [toy(trace, "a")]
    assert run_stages(call, stages) and run_stages(call, stages)
    assert trace.read_text().split() == ["a"]
    call.state = State(call.context.folder).load()
    assert run_stages(call, stages)
    assert trace.read_text().split() == ["a"]
    call.again = frozenset(["toy"])
    assert run_stages(call, stages)
    assert trace.read_text().split() == ["a", "a"]


def test_changed_sources_are_run_again(call, trace, tmp_path):
    (tmp_path / "source.py").write_text("1")
    stage = toy(trace, "a", sources=(os.path.relpath(tmp_path / "source.py", ROOT),))
    assert run_stages(call, [stage]) and run_stages(call, [stage])
    assert trace.read_text().split() == ["a"]
    (tmp_path / "source.py").write_text("2")
    assert run_stages(call, [stage])
    assert trace.read_text().split() == ["a", "a"]


def test_a_failed_stage_does_not_stop_the_others(call, trace):
    assert run_stages(call, [replace(toy(trace, "wrong"), name="one"), replace(toy(trace, "b"), name="two")])
    assert {name: record.ending for name, record in call.state.records.items()} == {"one": "failed", "two": "passed"}


def test_lanes_share_the_units(call, trace):
    names = [f"unit-{i}" for i in range(7)] + ["segfault"]
    record = run_stage(call, toy(trace, *names, lanes=3))
    assert record.ending == "failed"
    assert outcomes(call) == {**dict.fromkeys(names, "passed"), "segfault": "failed"}
    assert sorted(trace.read_text().split()) == sorted(names)
    # What another number of lanes has done is known, too.
    call.state.put(replace(record, ending="cut"))
    run_stage(call, toy(trace, *names, "more", lanes=2))
    assert sorted(trace.read_text().split()) == sorted([*names, "more"])


def test_an_interrupt_keeps_what_has_ended(call, trace):
    """Ctrl-C reaches the main thread only, while a unit runs."""
    stage = toy(trace, "a", "hang", "b")

    def press():
        while "hang" not in (trace.read_text() if trace.exists() else ""):
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=press).start()
    record = run_stage(call, stage)
    assert record.ending == "cut" and "interrupted" in record.detail
    assert outcomes(call) == {"a": "passed"}


def test_a_torn_line_costs_its_unit_only(tmp_path):
    ledger = Ledger(tmp_path / "rows-0.jsonl")
    ledger.finish(Row("a", "passed"))
    with ledger.path.open("a") as file:
        file.write('{"row": {"name": "b", "outco')
    ledger.start("c")
    ledger.finish(Row("d", "failed"))
    assert [row.name for row in ledger.rows()] == ["a", "d"] and ledger.open() == ["c"]
    ledger.begin()
    assert ledger.open() == [] and ledger.done() == {"a", "d"}
    with pytest.raises(ValueError, match=r"outcome must be one of .* got 'fine'"):
        Row("a", "fine")
