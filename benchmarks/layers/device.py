"""Times layers, training steps and pre-launch on a device, row by row, and can be cut and started again.

    python -m benchmarks.layers.device [--out DIR] [--device cuda] [--seconds S] [--shapes 4096x11008 ...] [--rehearse]

Rows are appended to DIR/rows.jsonl as they finish, the most telling first; rows that are there are not measured again. DIR is
by default a folder of benchmarks/results with the card's name. --seconds: no job, a few rows, begins after so many.
--rehearse: the same program on the CPU at tiny shapes, in seconds; no time in it means anything. At the end it reports, as
`python -m benchmarks.layers.device_report DIR` does at any time: tables, a picture, verdicts.

A row has three times: of the device (events behind a spin kernel, L2 flushed, arms in turn in random order), of eager steps
back to back on the wall, of a CUDA graph's replays. No arm has a time before it passed `checks` at its shape. Exit status: 0
when all is done, 75 when the time is over, 76 when the card no longer answers: start it again, and what brought it down twice
is left out.
"""

from __future__ import annotations

import argparse
import functools
import re
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from benchmarks.layers import backends, training
from benchmarks.layers.checks import check_by_norms, check_ours
from benchmarks.layers.device_report import report
from benchmarks.layers.meter import CardLost, Found, Meter, products_in, said
from benchmarks.layers.roofs import SIDE, products, roofs
from benchmarks.layers.variants import DIRECTIONS, FROZEN, OURS, VARIANTS, Case, Inputs, make_case, make_inputs
from benchmarks.layers.workloads import Job, Workload, all_jobs, rehearsal, selected
from benchmarks.prelaunch.device import prelaunch_row
from benchmarks.support.journal import ATTEMPTS, Journal, Row
from benchmarks.support.measure import RESULTS, ROOT, environment, wanted_device
from loradash_kernels.timing import card_facts, stopwatch_for

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "tf32": torch.float32}
GEMM = "vendor GEMM"
# The arm of a row that says why a job has no others.
WHOLE = "the whole job"
TIME_IS_OVER, CARD_IS_LOST = 75, 76


class Program:
    """Measures jobs, and writes what it finds.

    rehearsed: tiny sizes, and a compiler that takes no time. seconds: from now on, after which no job and no strategy begins.
    """

    def __init__(self, meter: Meter, journal: Journal, rehearsed: bool, seconds: float = float("inf")) -> None:
        self.meter, self.journal = meter, journal
        self.begun, self.seconds = time.monotonic(), seconds
        self.device, self.rehearsed = meter.device, rehearsed
        self.about = {**environment(), "device": str(meter.device), "rehearsed": rehearsed}
        self._late = 0
        self._look()

    @property
    def spent(self) -> float:
        """Seconds."""
        return time.monotonic() - self.begun

    @property
    def is_over(self) -> bool:
        return self.spent >= self.seconds

    def run(self, job: Job) -> None:
        """Adds the rows of a job that are not there; none where what the others stand beside has failed."""
        references = (FROZEN, OURS) if job.kind == "strategy" else (FROZEN,)
        failed = {row["key"] for row in self.journal.rows if row["error"]}
        if {key_of(job, arm) for arm in references} & failed or key_of(job, WHOLE) in self.journal.keys:
            return
        # The compiler gives up on a function that it has compiled for eight shapes.
        torch._dynamo.reset()
        measured = {
            "roofs": self._roofs,
            "layer": self._layer,
            "strategy": self._strategy,
            "training": self._training,
            "prelaunch": self._prelaunch,
        }
        try:
            measured[job.kind](job)
        except CardLost as error:
            # The next program leaves out what this one ended with.
            self._add(job, {"arm": error.arm, "error": error.why})
            raise
        except Exception as error:
            # What stands around the arms, their inputs say: the other jobs go on.
            traceback.print_exc()
            kind, words = _failure(error)
        else:
            return
        self._add(job, {"arm": WHOLE, kind: words})
        self.meter.recover(WHOLE, words)

    def _look(self, step: Callable[[], object] | None = None) -> None:
        """Notes the state of the card for the rows to come, while it takes this step again and again: at rest its clocks, its power
        and its reasons to throttle are others. And how many calls since the last look were timed with some of their launching,
        because the host came late."""
        with ThreadPoolExecutor(1) as pool:
            asked = pool.submit(card_facts, self.device)
            while step is not None and not asked.done():
                step()
                self.meter.synchronize()
        late = getattr(self.meter.stopwatch, "late", 0)
        self.facts = {**asked.result(), "late calls": late - self._late}
        self._late = late

    def missing(self, job: Job, arms: Any) -> list[str]:
        """The arms that have no row."""
        return [arm for arm in arms if key_of(job, arm) not in self.journal.keys]

    def _add(self, job: Job, row: Row) -> None:
        key = key_of(job, row["arm"])
        if key not in self.journal.keys:
            self.journal.add(
                {
                    "key": key,
                    "kind": job.kind,
                    **_sizes(job.workload),
                    "error": None,
                    "left out": None,
                    **row,
                    **self.facts,
                    **self.about,
                }
            )

    def _tried(self, job: Job, arm: str, attempt: Callable[[], Any]) -> Any:
        """What `attempt` returns; None, and a row that says why, where it fails or brought earlier programs down."""
        key = key_of(job, arm)
        if self.journal.ends_the_program(key):
            self._add(job, {"arm": arm, "error": f"hung the program or brought it down, {ATTEMPTS} times"})
            return None
        self.journal.begin(key)
        begun = self.spent
        try:
            found = attempt()
            self.meter.synchronize()
            self.journal.end(key)
            print(f"  {arm}: passed, {self.spent - begun:.1f} s", flush=True)
            return found
        except Exception as error:
            kind, words = _failure(error)
        print(f"  {arm}: {words}", flush=True)
        # What was allocated is free once the error is gone.
        self._add(job, {"arm": arm, kind: words})
        self.meter.recover(arm, words)
        self.journal.end(key)
        return None

    def _roofs(self, job: Job) -> None:
        if self.missing(job, ["empty launch"]):
            small = {"side": 64, "copied": 1 << 20} if self.rehearsed else {}
            rows = roofs(self.meter, **small)
            self._look(products(small.get("side", SIDE), self.device))
            for row in rows:
                self._add(job, row)

    def _prelaunch(self, job: Job) -> None:
        assert job.shape is not None
        n, k = job.shape
        for arm in self.missing(job, [f"directions of {n}x{k}"]):
            row = self._tried(job, arm, lambda: prelaunch_row(n, k, self.device))
            if row is not None:
                self._add(job, {"arm": arm, **row})

    def _training(self, job: Job) -> None:
        sizes = training.SMALL if self.rehearsed else training.Sizes()
        wanted, steps = self.missing(job, training.ADAPT), {}
        for arm in dict.fromkeys((FROZEN, *wanted)) if wanted else ():
            step = self._tried(job, arm, functools.partial(training.training_step, arm, sizes, self.device))
            if step is not None:
                steps[arm] = step
        found = {"step": self.meter.measure(steps)}
        found["wall"] = self.meter.wall(steps, found["step"].shortest)
        self._look(next(iter(steps.values()), None))
        for arm in wanted:
            if arm in steps:
                row = {"arm": arm, **times_of(arm, found), "stack": str(sizes)}
                row["peak bytes"] = self.meter.peak_bytes(steps[arm])
                if row["wall ms"]:
                    row["tokens/s"] = 1e3 * sizes.batch * sizes.tokens / row["wall ms"]
                self._add(job, row)

    def _layer(self, job: Job) -> None:
        workload = _workload(job)
        variants = [*VARIANTS, *(f"{OURS}, {name}" for name in backends.names(self.device))]
        wanted = self.missing(job, [*variants, GEMM])
        if not wanted:
            return
        with products_in(workload.dtype == "tf32"):
            inputs = make_inputs(workload.shape, DTYPES[workload.dtype], self.device)
            for name in backends.names(self.device):
                reason = backends.refusal(name, inputs.x, workload.rank + DIRECTIONS)
                if reason is not None:
                    self._add(job, {"arm": f"{OURS}, {name}", "left out": f"refused: {reason}"})
            cases = self._checked(job, dict.fromkeys((FROZEN, *self.missing(job, wanted))), inputs)
            found = self.meter.passes(cases)
            steps = {name: case.step for name, case in cases.items()}
            self._look(next(iter(steps.values()), None))
            found["wall"] = self.meter.wall(steps, found["step"].shortest)
            found["graph"] = self.meter.graphs(steps)
            if GEMM in wanted:
                product = functools.partial(torch.mm, inputs.x, inputs.weight.t(), out=torch.empty_like(inputs.dy))
                self._add(job, {"arm": GEMM, **times_of(GEMM, {"step": self.meter.measure({GEMM: product})})})
            for arm in wanted:
                if arm in cases:
                    case = cases[arm]
                    memory = {"peak bytes": self.meter.peak_bytes(case.step), "saved bytes": case.saved_bytes()}
                    self._add(job, {"arm": arm, **times_of(arm, found), **memory})

    def _strategy(self, job: Job) -> None:
        """Every strategy in the passes that it is a candidate of, beside the frozen layer and ours as it is."""
        workload = _workload(job)
        with products_in(workload.dtype == "tf32"):
            inputs = make_inputs(workload.shape, DTYPES[workload.dtype], self.device)
            ours = make_case(OURS, inputs, workload.dropout, workload.rank)
            arms = {arm.name: arm for arm in backends.arms_of(ours)}
            wanted = self.missing(job, arms)
            cases = self._checked(job, dict.fromkeys((FROZEN, OURS)), inputs) if wanted else {}
            for name in wanted if cases.keys() == {FROZEN, OURS} else ():
                case = arms[name].case(ours)
                if not self.is_over and self._tried(
                    job, name, functools.partial(self._check, case, inputs, workload, True)
                ):
                    cases[name] = case

            def takes(name: str, pass_: str) -> bool:
                return pass_ in (arms[name].passes if name in arms else backends.PASSES)

            found = self.meter.passes(cases, takes)
            self._look(ours.step)
            for name in wanted:
                if name in cases:
                    self._add(job, {"arm": name, "backend": arms[name].backend, **times_of(name, found)})

    def _checked(self, job: Job, arms: Mapping[str, Any], inputs: Inputs) -> dict[str, Case]:
        """The cases that pass their check, and then run; the others get rows that say why not."""
        workload = _workload(job)

        def case_of(arm: str) -> Case:
            variant, backend = (arm, "") if arm in VARIANTS else arm.split(", ")
            compiler = "aot_eager" if self.rehearsed else "inductor"
            case = make_case(variant, inputs, workload.dropout, workload.rank, compiler)
            if backend:
                case = backends.by_backend(case, backend)
            if variant != FROZEN:
                self._check(case, inputs, workload, variant == OURS)
            case.step()
            return case

        found = {arm: self._tried(job, arm, functools.partial(case_of, arm)) for arm in arms if arm != GEMM}
        return {arm: case for arm, case in found.items() if case is not None}

    def _check(self, case: Case, inputs: Inputs, workload: Workload, is_ours: bool) -> bool:
        """True; AssertionError where it does not pass."""
        # The error rule knows no products of TF32 operands.
        if is_ours and workload.dtype != "tf32":
            check_ours(case, inputs.weight, workload.dropout)
        else:
            check_by_norms(case, inputs.weight, workload.dtype == "tf32")
        return True


def _failure(error: Exception) -> tuple[str, str]:
    """In which field of a row an error stands, and its words. That a card is small is nobody's fault."""
    return "left out" if isinstance(error, torch.cuda.OutOfMemoryError) else "error", said(error)


def key_of(job: Job, arm: str) -> str:
    return f"{job}/{arm}"


def _workload(job: Job) -> Workload:
    assert job.workload is not None, f"{job.kind} jobs have a workload"
    return job.workload


def _sizes(workload: Workload | None) -> Row:
    if workload is None:
        return {}
    sizes = {"dtype": workload.dtype, "M": workload.m, "K": workload.k, "N": workload.n}
    return {**sizes, "r": workload.rank, "dropout": workload.dropout}


def times_of(name: str, found: Mapping[str, Found]) -> Row:
    """An arm's milliseconds, spreads and rounds of every measurement, over the frozen layer and over ours in the same rounds;
    null with its reason under "why null" where there is none."""
    row: Row = {}
    reasons = {}
    for time_, measured in found.items():
        samples = measured.samples.get(name)
        row[f"{time_} ms"] = None if samples is None else samples.median
        if samples is None:
            reasons[time_] = measured.errors.get(name, "not a candidate of this pass")
            continue
        rounds = len(samples.milliseconds)
        row |= {f"{time_} rounds": rounds, f"{time_} spread": samples.spread if rounds > 1 else None}
        for reference, word in ((FROZEN, "ratio"), (OURS, "over ours")):
            if reference in measured.samples:
                row[f"{time_} {word}"] = samples.median / measured.samples[reference].median
    if reasons.keys() == found.keys():
        # It passed its check, and then failed wherever it was timed.
        row["error"] = next(iter(reasons.values()))
    return {**row, "why null": reasons} if reasons else row


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder of rows.jsonl")
    parser.add_argument("--device", help="cuda, cuda:1, cpu; the card where there is one")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="no job begins after so many")
    parser.add_argument("--shapes", nargs="*", default=[], metavar="KxN", help="only these, KxN or MxKxN")
    parser.add_argument("--rehearse", action="store_true", help="tiny, on the CPU")
    options = parser.parse_args(arguments)
    try:
        device = wanted_device("cpu" if options.rehearse else options.device)
        jobs = selected(rehearsal() if options.rehearse else all_jobs(), options.shapes)
    except (ValueError, RuntimeError) as error:
        parser.error(str(error))
    if device.type == "cpu" and not (options.rehearse or options.device):
        parser.error(
            "PyTorch sees no GPU; --rehearse shows on a CPU that all of it runs, --device cpu measures it, for hours"
        )
    if device.index is not None:
        # Graphs, and kernels that are compiled for it, take the current one.
        torch.cuda.set_device(device)
    card = card_facts(device)["card"]
    folder = options.out or ROOT / RESULTS / re.sub(r"[^a-z0-9]+", "_", card.lower()).strip("_")
    journal = Journal(folder)
    check_same_card(journal.rows, card)
    limits = {"seconds": 0.3, "least": 3, "most": 5} if options.rehearse else {}
    program = Program(Meter(device, stopwatch_for(device), **limits), journal, options.rehearse, options.seconds)
    try:
        done = run_jobs(program, jobs)
    except CardLost as error:
        print(f"the card no longer answers ({error}); start again to go on", file=sys.stderr)
        return CARD_IS_LOST
    print(f"{done} of {len(jobs)} jobs, {len(journal.rows)} rows in {journal.path}")
    if journal.rows:
        for verdict in report(folder).values():
            print(verdict)
    return 0 if done == len(jobs) else TIME_IS_OVER


def check_same_card(rows: list[Row], card: str) -> None:
    """SystemExit where rows of another card are there: ratios between cards mean nothing."""
    others = {row["card"] for row in rows} - {card}
    if others:
        raise SystemExit(f"--out holds rows of {', '.join(sorted(others))}; this is {card}: take another folder")


def run_jobs(program: Program, jobs: list[Job]) -> int:
    """Runs them in order until the time is over; how many were finished. Says after each how far it is."""
    for done, job in enumerate(jobs):
        if not program.is_over:
            program.run(job)
        # A job may be cut between its strategies.
        if program.is_over:
            print(f"the time is over: {len(jobs) - done} jobs are left, from {job} on", flush=True)
            return done
        spent = program.spent
        left = min(spent / (done + 1) * (len(jobs) - done - 1), program.seconds - spent)
        rows = len(program.journal.rows)
        print(f"{done + 1}/{len(jobs)} {job}: {rows} rows, {spent:.0f} s, about {left:.0f} s left", flush=True)
    return len(jobs)


if __name__ == "__main__":
    sys.exit(main())
