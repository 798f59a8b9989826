"""Runs stages in order, within their budgets and that of the call; what has ended is not repeated."""

from __future__ import annotations

import os
import shutil
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from .ledger import Ledger, Row
from .runner import GRACE, Ended, Process
from .screen import Screen, clock, last_line, last_lines
from .stage import ROOT, Context, Missing, Stage, Turn
from .state import Record, State, hash_of
from .worker import LEDGER, SECONDS, START_AGAIN, TIME_IS_UP

# Nothing need be installed: the packages are imported from the checkout.
FOLDERS = [str(ROOT / room) for room in (".", "python", "tools/ptxsim")]
CUT = "the call is over, the next one goes on"
INTERRUPTED = "interrupted; what has ended is kept"
PAUSE = 0.1


@dataclass
class Call:
    """One call of the proof. end: when it must be over, on the monotonic clock; again: stages to repeat.

    budgets: seconds of stages, where they are not the stages' own.
    """

    context: Context
    state: State
    screen: Screen
    end: float = float("inf")
    again: frozenset[str] = frozenset()
    budgets: dict[str, float] = field(default_factory=dict)

    @property
    def left(self) -> float:
        return self.end - time.monotonic()

    def budget(self, stage: Stage) -> float:
        return self.budgets.get(stage.name, stage.rehearsal if self.context.rehearse else stage.budget)

    def patience(self, stage: Stage) -> float:
        """A CPU that others use too may be silent for long."""
        return max(stage.patience, stage.rehearsal) if self.context.rehearse else stage.patience


def import_path() -> dict[str, str]:
    """The environment in which the checkout's packages are found, before those that the interpreter is told of."""
    return {"PYTHONPATH": os.pathsep.join([*FOLDERS, *filter(None, [os.environ.get("PYTHONPATH")])])}


def run_stages(call: Call, stages: Sequence[Stage]) -> bool:
    """Whether all of them have ended; False where the call was over first, or was interrupted."""
    for number, stage in enumerate(stages, 1):
        head = f"[{number}/{len(stages)}] {stage.name}"
        kept = kept_of(call, stage)
        if kept and not unfinished(call, stage, kept):
            call.screen.say(f"{head}: {kept.ending} before, in {clock(kept.seconds)}. {kept.detail}")
            continue
        call.screen.say(f"{head}: at most {clock(call.budget(stage))}")
        record = run_stage(call, stage)
        call.screen.say(f"{head}: {record.ending}, {clock(record.seconds)}. {record.detail}")
        if not record.finished:
            return False
    return True


def run_stage(call: Call, stage: Stage) -> Record:
    """Runs the lanes of a stage until each is through, or nothing more can be done, and keeps the record."""
    record = begin(call, stage)
    start, before = time.monotonic(), record.seconds
    lanes = [Lane(call, stage, Turn(0, i, count)) for count in [stage.lanes(call.context)] for i in range(count)]

    def now() -> Record:
        starts = record.starts + sum(lane.starts for lane in lanes)
        return replace(record, seconds=before + time.monotonic() - start, starts=starts)

    try:
        while True:
            going = [lane.step(now()) for lane in lanes]
            if not any(going):
                break
            call.screen.progress(stage.name, now().seconds, record.budget, progress_of(call, stage))
            time.sleep(PAUSE)
    except KeyboardInterrupt:
        for lane in lanes:
            lane.interrupt()
    finally:
        # An error of this program itself must leave nothing running.
        for lane in lanes:
            lane.stop()
    # A lane that was cut decides before one that failed: the next call goes on with it.
    order = ("cut", "over", "failed", "missing", "passed")
    worst = min(lanes, key=lambda lane: order.index(lane.ending))
    return conclude(call, stage, now(), worst.ending, worst.detail)


class Lane:
    """One of the processes that share a stage, started again and again until it is through."""

    def __init__(self, call: Call, stage: Stage, turn: Turn) -> None:
        self.call, self.stage, self.turn = call, stage, turn
        folder = call.context.of(stage.name)
        self.ledger, self.log = Ledger(folder / f"rows-{turn.lane}.jsonl"), folder / f"log-{turn.lane}.txt"
        self.ending, self.detail, self.starts = "", "", 0
        self.process: Process | None = None
        self.rows_before, self.fruitless, self.tight = 0, 0, False

    def step(self, record: Record) -> bool:
        """Starts the process, or sees whether it has ended; whether there is more to do."""
        if not self.ending and self.process is None:
            self._start(record)
        elif self.process is not None:
            ended = self.process.poll()
            if ended is not None:
                self.process = None
                self._judge(ended)
        return not self.ending

    def interrupt(self) -> None:
        self.stop()
        if not self.ending:
            self._end("cut", INTERRUPTED)

    def stop(self) -> None:
        if self.process is not None:
            self.process.stop()
            self.process = None

    def _start(self, record: Record) -> None:
        spare, least = record.budget - record.seconds, min(self.stage.least, record.budget)
        if spare < least:
            return self._run_out()
        if self.call.left < least:
            return self._end("cut", CUT)
        left, self.tight = min(spare, self.call.left), self.call.left < spare
        command = self.stage.command(self.call.context, replace(self.turn, seconds=left))
        if isinstance(command, Missing):
            return self._end("missing", command.reason)
        self.ledger.begin()
        self.rows_before = len(self.ledger.rows())
        self.starts += 1
        environment = {
            **import_path(),
            "PYTHONUNBUFFERED": "1",
            LEDGER: str(self.ledger.path),
            # It stops by itself a little before it would be killed.
            SECONDS: f"{max(left - 2 * GRACE, left / 2):.1f}",
            # What was measured for this user before must decide nothing.
            "LORADASH_CACHE": str(self.call.context.of(self.stage.name) / "store"),
            **command.environment,
        }
        self.process = Process(
            command.argv,
            self.log,
            budget=left,
            patience=self.call.patience(self.stage),
            signs=lambda: self.ledger.path.stat().st_size,
            environment=environment,
            folder=ROOT,
        )

    def _judge(self, ended: Ended) -> None:
        """What a process that has ended means: the end of the lane, or that the rest goes on in a new one."""
        if ended.how == "budget" or (ended.how == "exit" and ended.code == TIME_IS_UP):
            return self._end("cut", CUT) if self.tight else self._run_out()
        if ended.how == "exit" and self.stage.complete(ended.code):
            return self._end("passed", "")
        if ended.how != "exit" or ended.code != START_AGAIN:
            self._blame(ended)
        # What goes on without an end must add rows.
        self.fruitless = 0 if len(self.ledger.rows()) > self.rows_before else self.fruitless + 1
        if self.fruitless > self.stage.fruitless:
            self._end("failed", f"{ended}, and no result. It said:\n{self._said()}")

    def _run_out(self) -> None:
        """The budget is used up."""
        if self.stage.elastic:
            return self._end("passed", "as much as fits into its time")
        return self._end("over", f"its time was up before the end{''.join(f', in {n}' for n in self.ledger.open())}")

    def _blame(self, ended: Ended) -> None:
        """A unit in which the process died or hung has failed; the next start goes on behind it."""
        for name in self.ledger.open():
            self.ledger.finish(Row(name, "failed", detail=f"{ended}\n{self._said()}"))

    def _said(self) -> str:
        return "\n".join(last_lines(self.log, 12))

    def _end(self, ending: str, detail: str) -> None:
        self.ending, self.detail = ending, detail


def kept_of(call: Call, stage: Stage) -> Record | None:
    """What earlier calls know of a stage; None where it is to be repeated, or its sources have changed."""
    kept = call.state.records.get(stage.name)
    right = kept is not None and kept.sources == hash_of(stage.sources) and stage.name not in call.again
    return kept if right else None


def unfinished(call: Call, stage: Stage, kept: Record) -> bool:
    """Is there more to do? One whose time was up goes on where it is given more."""
    return not kept.finished or (kept.ending == "over" and call.budget(stage) > kept.budget)


def begin(call: Call, stage: Stage) -> Record:
    """The record of a stage that was cut short, or a new one, whose old rows are dropped."""
    sources, budget = hash_of(stage.sources), call.budget(stage)
    kept = kept_of(call, stage)
    if kept and unfinished(call, stage, kept):
        return replace(kept, budget=budget)
    if call.context.of(stage.name).exists():
        shutil.rmtree(call.context.of(stage.name))
    record = Record(stage.name, "cut", "not begun", 0.0, budget, 0, sources)
    call.state.put(record)
    return record


def progress_of(call: Call, stage: Stage) -> str:
    """How many units have ended, and what was said last."""
    logs = sorted(call.context.of(stage.name).glob("log-*.txt"), key=lambda path: path.stat().st_mtime)
    return last_line(logs[-1]) if logs else ""


def conclude(call: Call, stage: Stage, record: Record, ending: str, detail: str) -> Record:
    """Puts down how the stage ended. One that came through has passed where its units have, and there are any."""
    counts = Counter(row.outcome for row in call.context.rows(stage.name))
    if ending == "passed":
        ending = "failed" if counts["failed"] or not counts else "missing" if {*counts} == {"missing"} else "passed"
    text = ", ".join(f"{number} {outcome}" for outcome, number in counts.items()) or "nothing was run"
    record = replace(record, ending=ending, detail="; ".join(part for part in (text, detail) if part))
    call.state.put(record)
    return record
