"""Rows of the comparison for people: a table on the screen, two short ones in Markdown, a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.support import plots
from benchmarks.support.measure import environment

from .arms import ACCELERATED, ARMS, AUTHORS, BEFORE, DASH_LINEAR, FROZEN, LORADASH, PEFT, PEFT_NARROW
from .memory import MEASURES

Row = dict[str, Any]
Lines = list[list[str]]
TITLE = "A training step over the frozen model's: LLaMA under transformers' Trainer"
_MIB = 1 << 20
# What before launch is pale.
_COLORS = {
    PEFT: "#2b6cb0",
    PEFT_NARROW: "#90cdf4",
    ACCELERATED: "#2f855a",
    f"{AUTHORS}{BEFORE}": "#e2d3a8",
    AUTHORS: "#b7791f",
    f"{DASH_LINEAR}{BEFORE}": "#cbd5e0",
    DASH_LINEAR: "#4a5568",
    f"{LORADASH}{BEFORE}": "#feb2b2",
}
# The quotients that answer what the comparison is for: above, below.
_ANSWERS = (
    (LORADASH, FROZEN),
    (LORADASH, PEFT),
    (LORADASH, AUTHORS),
    (LORADASH, DASH_LINEAR),
    (ACCELERATED, PEFT),
    # In 16 bits PEFT's own default computes its adapters in float32: this is beside what does not.
    (LORADASH, PEFT_NARROW),
    (ACCELERATED, PEFT_NARROW),
    (ACCELERATED, FROZEN),
)


def group_of(row: Row) -> str:
    return f"{row['dtype']}, {row['layers']} layers of {row['hidden']}"


def grouped(rows: list[Row]) -> dict[str, dict[str, Row]]:
    """Rows by model and arm."""
    groups: dict[str, dict[str, Row]] = {}
    for row in rows:
        groups.setdefault(group_of(row), {})[row["arm"]] = row
    return groups


def mebibytes(row: Row, measure: str) -> str:
    return "" if row[measure] == "" else f"{row[measure] / _MIB:.0f}"


def show(rows: list[Row]) -> None:
    table = Table("model", "arm", "wall", "processor", "spread", "FLOPs", "bytes", *MEASURES, title=TITLE)
    for name, group in grouped(rows).items():
        for arm, row in group.items():
            ratios = (f"{row[column]:.3f}" for column in ("ratio", "processor ratio", "spread"))
            models = f"{row['modelled FLOPs']:.2f}", f"{row['modelled bytes']:.2f}"
            table.add_row(name, arm, *ratios, *models, *(mebibytes(row, m) for m in MEASURES))
        table.add_section()
    console = Console(width=180)
    console.print(table)
    head, *answers = answer_lines(rows)
    quotients = Table(*head, title="wall time of a step over another's (time of the processor)")
    for line in answers:
        quotients.add_row(*line)
    console.print(quotients)
    console.print(
        "Time, FLOPs and bytes moved over the frozen model's, the latter two modelled; spread: interquartile range over the "
        f"median of {min(row['steps'] for row in rows)} steps or more. Memory of one step in MiB."
    )
    console.print(environment())


def time_lines(rows: list[Row]) -> Lines:
    """An arm a line, a model a column: wall time over the frozen model's, and in brackets what its FLOPs come to."""
    groups = grouped(rows)
    known = [name for name in ARMS if any(name in group for group in groups.values())]

    def cell(row: Row | None) -> str:
        return "" if row is None else f"{row['ratio']:.2f} ({row['modelled FLOPs']:.2f})"

    return [["arm", *groups], *([name, *(cell(group.get(name)) for group in groups.values())] for name in known)]


def answer_lines(rows: list[Row]) -> Lines:
    """An arm over another a line, a model a column: wall time, and in brackets time of the processor."""
    groups = grouped(rows)

    def cell(group: dict[str, Row], above: str, below: str) -> str:
        if above not in group or below not in group:
            return ""
        wall, processor = (group[above][column] / group[below][column] for column in ("ratio", "processor ratio"))
        return f"{wall:.2f} ({processor:.2f})"

    asked = [pair for pair in _ANSWERS if any(group.keys() >= {*pair} for group in groups.values())]
    return [
        ["step time", *groups],
        *([f"{above} / {below}", *(cell(group, above, below) for group in groups.values())] for above, below in asked),
    ]


def memory_lines(rows: list[Row]) -> Lines:
    measured = [row for row in rows if row[MEASURES[0]] != ""]
    head = ["model", "arm", *(measure.replace("bytes", "MiB") for measure in MEASURES)]
    return [head, *([group_of(row), row["arm"], *(mebibytes(row, m) for m in MEASURES)] for row in measured)]


def markdown(lines: Lines) -> str:
    head, *body = lines
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *body)) + "\n"


def write(rows: list[Row], folder: Path) -> None:
    """front_ends.md and front_ends.png. Needs matplotlib."""
    about = ", ".join(f"{name} {value}" for name, value in environment().items())
    tables = f"{markdown(answer_lines(rows))}\nOver the frozen model, and in brackets its FLOPs:\n\n{markdown(time_lines(rows))}\nMemory of one step:\n\n{markdown(memory_lines(rows))}"
    (folder / "front_ends.md").write_text(
        f"Wall time of a training step over another's, and in brackets time of the processor:\n\n{tables}\n{about}\n"
    )
    ratios = {
        name: {arm: row["ratio"] for arm, row in group.items() if arm != FROZEN}
        for name, group in grouped(rows).items()
    }
    arms = [name for name in ARMS if any(name in group for group in ratios.values())]
    colors = [_COLORS[name] for name in arms if name != LORADASH]
    plots.ratio_panels({"wall time of a step": ratios}, arms, LORADASH, TITLE, folder / "front_ends.png", colors)
