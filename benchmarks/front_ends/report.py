"""Rows of the comparison for people: a table on the screen, the same in Markdown, a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.support import plots
from benchmarks.support.measure import environment

from .arms import ARMS, FROZEN, LORADASH
from .memory import MEASURES

Row = dict[str, Any]
TITLE = "A training step over the frozen model's: LLaMA under transformers' Trainer"
_MIB = 1 << 20


def group_of(row: Row) -> str:
    return f"{row['dtype']}, {row['layers']} layers of {row['hidden']}, {row['rows']} rows"


def grouped(rows: list[Row]) -> dict[str, dict[str, Row]]:
    """Rows by model and arm."""
    groups: dict[str, dict[str, Row]] = {}
    for row in rows:
        groups.setdefault(group_of(row), {})[row["arm"]] = row
    return groups


def columns(rows: list[Row]) -> list[str]:
    groups = grouped(rows)
    return [
        "arm",
        *(f"{name}: wall / processor (FLOPs, bytes)" for name in groups),
        *(f"{m}, MiB" for m in _measured(groups)),
    ]


def _measured(groups: dict[str, dict[str, Row]]) -> list[str]:
    """Titles of the columns of memory: the measure and the dtype."""
    dtypes = dict.fromkeys(group[FROZEN]["dtype"] for group in groups.values() if group[FROZEN][MEASURES[0]] != "")
    return [f"{dtype} {measure}" for dtype in dtypes for measure in MEASURES]


def lines(rows: list[Row]) -> list[list[str]]:
    """One for every arm: its time over the frozen model's beside what was modelled, and its memory."""
    groups = grouped(rows)
    table = []
    for name in (name for name in ARMS if any(name in group for group in groups.values())):
        line = [name, *(_ratio(group.get(name)) for group in groups.values())]
        for group in groups.values():
            if group[FROZEN][MEASURES[0]] != "":
                line += [f"{group[name][m] / _MIB:.0f}" if name in group else "" for m in MEASURES]
        table.append(line)
    return table


def _ratio(row: Row | None) -> str:
    if row is None:
        return ""
    return (
        f"{row['ratio']:.3f} / {row['processor ratio']:.3f} ({row['modelled FLOPs']:.2f}, {row['modelled bytes']:.1f})"
    )


def show(rows: list[Row]) -> None:
    console = Console(width=200)
    table = Table(*columns(rows), title=TITLE)
    for line in lines(rows):
        table.add_row(*line)
    console.print(table)
    steps, spread = min(row["steps"] for row in rows), max(row["spread"] for row in rows)
    console.print(f"medians of at least {steps} steps; interquartile range at most {100 * spread:.1f}% of the median")
    console.print(environment())


def markdown(rows: list[Row]) -> str:
    head = columns(rows)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *lines(rows))) + "\n"


def write(rows: list[Row], folder: Path) -> None:
    """front_ends.md and front_ends.png. Needs matplotlib."""
    about = ", ".join(f"{name} {value}" for name, value in environment().items())
    (folder / "front_ends.md").write_text(f"{TITLE}\n\n{markdown(rows)}\n{about}\n")
    ratios = {
        name: {arm: row["ratio"] for arm, row in group.items() if arm != FROZEN}
        for name, group in grouped(rows).items()
    }
    arms = [name for name in ARMS if any(name in group for group in ratios.values())]
    plots.ratio_panels({TITLE: ratios}, arms, LORADASH, "", folder / "front_ends.png")
