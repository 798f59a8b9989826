"""PEFT's own tests with the accelerator on and off, and with LORADASH in LoRA's place: `make peft-tests`.

    python -m tools.peft_tests                                # everything; PEFT's sdist comes from PyPI
    python -m tools.peft_tests --switch accelerated --file test_mixed --sdist FOLDER

Prints and, with --out, writes the table. Where nothing is asked for, files that call few layers run under two switches of the
four, and those that need models from the Hugging Face hub only where it is within reach. Exit code 1 where a test ends otherwise without a reason in
tools/peft_tests/explained.py, where a reason there explains nothing, or where no call ran fused.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from tools.peft_tests import compare, hub, report, runs, sdist
from tools.peft_tests.suite import ABOUT, SUITES, Suite

console = Console()


def main(
    switch: Annotated[list[str] | None, typer.Option(help="accelerated, loradash or launched; all of them")] = None,
    file: Annotated[
        list[str] | None, typer.Option(help="a file of PEFT's tests, such as test_mixed; all known ones")
    ] = None,
    sdist_folder: Annotated[Path | None, typer.Option("--sdist", help="where PEFT's sdist lies; PyPI's by pip")] = None,
    out: Annotated[Path | None, typer.Option(help="a folder for peft_tests.md and peft_tests.json")] = None,
    jobs: Annotated[int, typer.Option(help="processes at a time", min=1)] = 1,
    offline: Annotated[bool, typer.Option(help="keep the Hugging Face hub out of reach")] = False,
) -> None:
    switches = chosen(switch, list(ABOUT), "--switch")
    files = chosen(file, [suite.file for suite in SUITES], "--file")
    hub_is = "closed" if offline or not hub.reachable() else "open"
    # A file that is named runs all the same.
    suites = [suite for suite in SUITES if suite.file in files and (file or hub_is == "open" or not suite.hub)]
    try:
        wanted = [(one, on) for one in suites for on in ["off", *switches] if switch or on in ("off", *one.switches)]
        outcomes = gathered(sdist.unpacked(sdist_folder), wanted, hub_is, jobs)
    except (sdist.NoSdist, runs.Broken) as error:
        console.print(str(error), style="red", markup=False)
        raise SystemExit(1) from None
    found = compare.differences(outcomes)
    print(report.as_markdown(outcomes, found, report.facts()))
    if out:
        report.write(out, outcomes, found)
    complaints = faults(outcomes, found)
    if not switch and not file:
        complaints += [f"nothing needs this reason any more: {one.why}" for one in compare.stale(found)]
    for complaint in complaints:
        console.print(complaint, style="red", markup=False)
    sys.exit(bool(complaints))


def chosen(wanted: list[str] | None, known: list[str], option: str) -> list[str]:
    unknown = [name for name in wanted or () if name not in known]
    if unknown:
        raise typer.BadParameter(f"{option} {unknown[0]}: known are {', '.join(known)}")
    return [name for name in known if not wanted or name in wanted]


def gathered(folder: Path, wanted: list[tuple[Suite, str]], hub_is: str, jobs: int) -> compare.Outcomes:
    """The outcomes of every (file, switch), with a line of progress for each process."""
    outcomes: dict[tuple[str, str], list[runs.Test]] = {}
    columns = TextColumn("{task.description}"), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console, transient=True) as progress:
        tasks: dict[runs.Run, TaskID] = {}

        def tell(running: list[runs.Run]) -> None:
            for run in running:
                if run not in tasks:
                    tasks[run] = progress.add_task(f"{run.suite.file} ({run.switch})", total=None)
                progress.update(tasks[run], completed=len(run.tests()), total=run.collected() or None)

        for run in runs.run(folder, wanted, hub_is, jobs, tell):
            tests = outcomes[run.suite.file, run.switch] = run.finished()
            progress.remove_task(tasks[run])
            console.print(f"{run.suite.file} ({run.switch}): {report.cell(tests)}, {fused(tests)} fused")
    return {(suite.file, switch): outcomes[suite.file, switch] for suite, switch in wanted}


def fused(tests: list[runs.Test]) -> int:
    return compare.calls(tests)["fused"]


def faults(outcomes: compare.Outcomes, found: list[compare.Difference]) -> list[str]:
    """What makes the run fail, in sentences."""
    said = [
        f"{one.file} ({one.switch}): {one.test}: {one.off} without, {one.on} with: {one.message}"
        for one in found
        if one.reason is None
    ]
    # What the tuner refuses leaves some files without a layer of it.
    per_file = [key for key in outcomes if key[1] in ("accelerated", "accelerate") and key[0] in fusing()]
    said += [f"{file} ({switch}): no call ran fused" for file, switch in per_file if not fused(outcomes[file, switch])]
    whole = {switch: sum(fused(tests) for (_, on), tests in outcomes.items() if on == switch) for _, switch in outcomes}
    return said + [f"{switch}: no call ran fused in any file" for switch in ABOUT if whole.get(switch) == 0]


def fusing() -> set[str]:
    return {suite.file for suite in SUITES if suite.fuses}


if __name__ == "__main__":
    typer.run(main)
