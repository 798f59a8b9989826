"""Proves the kernels on the card at hand: builds, tests, sanitizes, stresses, measures, and says what came of it.

    make gpu-proof                      or    python -m benchmarks.proof
    make gpu-proof REHEARSE=1           or    python -m benchmarks.proof --rehearse

About half an hour, in one call or, with --limit, in several: what has ended is not repeated, and Ctrl-C loses nothing.
Exit codes: 0 everything passed, 1 a test or a verdict failed or something could not be measured, 2 it cannot run here,
3 it was cut: the same command goes on.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import signal
import sys
import tarfile
import time
from pathlib import Path
from typing import Any, NoReturn

from .doctor import NEEDED
from .documents import summary
from .runner import Process
from .schedule import PAUSE, Call, import_path, run_stage, run_stages
from .schema import verdicts_hold
from .screen import Screen, clock, last_lines
from .stage import ROOT, Context
from .stages import STAGES
from .state import State, Unusable, restore

PASSED, FAILED, UNABLE, CUT = range(4)
REPORT_SECONDS = 60.0
# Ctrl-C, a scheduler's end of the job, a terminal that is closed.
ENDS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
NAMES = [stage.name for stage in STAGES]


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.proof", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, small, to see that all of it works")
    parser.add_argument("--stages", type=names, default=NAMES, help=f"some of {','.join(NAMES)}")
    parser.add_argument("--again", type=names, default=[], help="stages to repeat though they ended, or all")
    parser.add_argument("--limit", type=float, default=float("inf"), help="seconds for this call")
    parser.add_argument("--budget", type=budget, action="append", default=[], metavar="STAGE=SECONDS")
    parser.add_argument("--out", type=Path, help="where the results go; below the state's folder unless given")
    parser.add_argument("--state", type=Path, default=ROOT / "runs" / "gpu-proof", help="where the state is kept")
    parser.add_argument("--resume", type=Path, metavar="PROOF_JSON", help="go on from the results of another machine")
    return parser.parse_args(arguments)


def names(text: str) -> list[str]:
    found = NAMES if text == "all" else text.split(",")
    if wrong := [name for name in found if name not in NAMES]:
        raise argparse.ArgumentTypeError(f"{wrong[0]!r} is no stage, wanted some of {','.join(NAMES)}")
    return found


def budget(text: str) -> tuple[str, float]:
    name, _, seconds = text.partition("=")
    try:
        return names(name)[0], float(seconds)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no budget, wanted STAGE=SECONDS") from error


def examine(options: argparse.Namespace, call: Call) -> dict[str, Any]:
    """What the doctor finds, in every call anew: the card decides where the state lies. Raises Unusable."""
    record = run_stage(call, STAGES[0])
    facts = call.context.of("doctor") / "facts.json"
    if record.ending == "cut":
        raise KeyboardInterrupt
    if not facts.exists():
        raise Unusable(f"the doctor found nothing out. {record.detail}")
    return json.loads(facts.read_text())


def slug(facts: dict[str, Any], rehearse: bool) -> str:
    """The folder of a card, as nvidia-h100-80gb-hbm3."""
    return "rehearsal" if rehearse else re.sub(r"[^a-z0-9]+", "-", facts["card"]["name"].lower()).strip("-")


def prove(options: argparse.Namespace, screen: Screen) -> int:
    start = time.monotonic()
    waiting = options.state / ".doctor"
    shutil.rmtree(waiting, ignore_errors=True)
    doctor = Call(Context(waiting, {}, options.rehearse), State(waiting), screen)
    facts = examine(options, doctor)
    if lacking := [name for name in NEEDED if not facts["packages"][name]]:
        screen.say(f"cannot run here: {', '.join(lacking)} not installed for {sys.executable}")
        return UNABLE
    if not facts["card"] and not options.rehearse:
        screen.say(f"cannot run here: {facts['card trouble']}. Without a card: make gpu-proof REHEARSE=1")
        return UNABLE
    folder = options.state / slug(facts, options.rehearse)
    # Also where the state cannot be read.
    if options.again == NAMES:
        shutil.rmtree(folder, ignore_errors=True)
    state = State(folder)
    if options.resume and state.path.exists():
        # The same command must go on, and not begin where the other machine ended.
        screen.say(f"--resume: not needed, this machine goes on with {folder}")
    elif options.resume:
        restore(folder, options.resume)
    state.load()
    state.facts = facts
    shutil.rmtree(folder / "doctor", ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    shutil.move(waiting / "doctor", folder / "doctor")
    state.put(doctor.state.records["doctor"])
    # Room for the report, so that a call that is cut has one too.
    end = start + options.limit - min(REPORT_SECONDS, options.limit / 4)
    call = Call(
        Context(folder, facts, options.rehearse), state, screen, end, frozenset(options.again), dict(options.budget)
    )
    through = run_stages(call, [stage for stage in STAGES[1:] if stage.name in options.stages])
    out = options.out or folder / "results"
    report(folder, out, options.rehearse, screen)
    proof = json.loads((out / "proof.json").read_text())
    screen.say("")
    screen.say(summary(proof))
    screen.say(f"\nresults: {out}; {clock(time.monotonic() - start)} in this call")
    return code_of(proof, options.stages, through)


def report(folder: Path, out: Path, rehearse: bool, screen: Screen) -> None:
    """In a process of its own, as all stages. Raises Unusable where it fails."""
    log = folder / "report" / "log-0.txt"
    log.unlink(missing_ok=True)
    argv = [sys.executable, "-m", f"{__package__}.report", str(folder), "--out", str(out)]
    argv += ["--rehearse"] if rehearse else []
    process = Process(argv, log, budget=REPORT_SECONDS, environment=import_path(), folder=ROOT)
    while (ended := process.poll()) is None:
        time.sleep(PAUSE)
    said = "\n".join(last_lines(log, 12))
    if ended.how != "exit" or ended.code:
        raise Unusable(
            f"the report could not be written, {ended}; what it is made of is in {pack(folder, out)}:\n{said}"
        )
    if said:
        screen.say(said)


def pack(folder: Path, out: Path) -> Path:
    """Everything that the stages wrote down, in one file: half an hour on a card must not be lost with a report."""
    out.mkdir(parents=True, exist_ok=True)
    with tarfile.open(out / "state.tar.gz", "w:gz") as archive:
        for path in sorted(folder.rglob("*")):
            if path.is_file() and path.suffix in (".json", ".jsonl", ".txt"):
                archive.add(path, str(path.relative_to(folder)))
    return out / "state.tar.gz"


def code_of(proof: dict[str, Any], chosen: list[str], through: bool) -> int:
    """The exit code for the stages that were asked for; verdicts count where the benchmarks were."""
    endings = {stage["ending"] for stage in proof["stages"] if stage["name"] in chosen}
    if not through or "cut" in endings:
        return CUT
    held = "bench" not in chosen or verdicts_hold(proof["verdicts"], proof["rehearsal"])
    return PASSED if held and endings == {"passed"} else FAILED


def interrupted(number: int, frame: object) -> NoReturn:
    """Once: while processes are being ended, a second Ctrl-C would leave some of them running."""
    for one in ENDS:
        signal.signal(one, signal.SIG_IGN)
    raise KeyboardInterrupt


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    screen = Screen()
    for number in ENDS:
        signal.signal(number, interrupted)
    try:
        return prove(options, screen)
    except KeyboardInterrupt:
        screen.say("interrupted; what has ended is kept, and the same command goes on")
        return CUT
    except Unusable as error:
        screen.say(f"cannot go on: {error}")
        return UNABLE
    except OSError as error:
        screen.say(
            f"cannot go on: {error.filename or 'a file'}: {error.strerror}; results so far are in {options.state}"
        )
        return UNABLE


if __name__ == "__main__":
    sys.exit(main())
