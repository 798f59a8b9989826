"""Tables, a picture and verdicts of what `benchmarks.layers.device` measured.

    python -m benchmarks.layers.device_report DIR

Reads DIR/rows.jsonl and writes, into DIR, device.csv (every row), device.png (time over the frozen layer, by shape; without
matplotlib it is left out, and said so) and device.md (the same numbers and the verdicts in words).
"""

from __future__ import annotations

import argparse
import csv
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.layers.variants import COMPILED, DENSE, FACTORED, FROZEN, IN_PLACE, OURS, PEFT
from benchmarks.layers.verdicts import Row, Verdict, by_workload, verdicts, workload_of
from benchmarks.support.journal import read_lines

SHOWN = (PEFT, IN_PLACE, FACTORED, COMPILED, DENSE, OURS)
TIMES = ("step", "wall", "graph")
# A picture has room for so many workloads: the first, which tell the most. The tables have all.
DRAWN = 9
TITLES = {
    "step": "device time",
    "wall": "eager, back to back",
    "graph": "CUDA graph replay",
    "forward": "device time of forward alone",
    "backward": "device time of backward alone",
}


def ratios(rows: Iterable[Row], time_: str = "step") -> dict[str, dict[str, float | None]]:
    """A step over the frozen layer: workload -> arm -> ratio; time_: one of TITLES."""
    return {
        where: {arm: row.get(f"{time_} ratio") for arm, row in arms.items() if arm != FROZEN}
        for where, arms in by_workload(rows, "layer").items()
    }


def write_rows(rows: list[Row], path: Path) -> None:
    """Every row with every field that any of them has."""
    fields = list(dict.fromkeys(name for row in rows for name in row))
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=fields)
        writer.writeheader()
        writer.writerows(rows)


def _cell(value: Any) -> str:
    return "-" if value is None else f"{value:.3f}" if isinstance(value, float) else str(value)


def _table(columns: list[str], lines: Iterable[Iterable[Any]]) -> list[str]:
    head = [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
    return [*head, *(f"| {' | '.join(map(_cell, line))} |" for line in lines), ""]


def _state(rows: list[Row]) -> str:
    """How the card was while it was measured."""
    reasons = Counter(row["throttled"] for row in rows)
    late = sum({row["key"].rpartition("/")[0]: row["late calls"] for row in rows}.values())
    throttled = ", ".join(f"{reason} in {number}" for reason, number in reasons.most_common())
    return f"Throttled, of {len(rows)} rows: {throttled}. Power limit {rows[0]['power limit']}. Calls timed with launching: {late}"


def _fastest(rows: list[Row]) -> list[list[Any]]:
    """The fastest strategy of each pass at each workload, over the frozen layer and over ours by default."""
    lines = []
    for where, arms in by_workload(rows, "strategy").items():
        for pass_ in ("forward", "backward"):
            timed = [row for row in arms.values() if row.get(f"{pass_} ms")]
            if timed:
                best = min(timed, key=lambda row: row[f"{pass_} ms"])
                lines.append(
                    [where, pass_, best["arm"], *(best[f"{pass_} {name}"] for name in ("ms", "ratio", "over ours"))]
                )
    return lines


def text_of(rows: list[Row]) -> str:
    """The report in words and tables."""
    found, first = verdicts(rows), rows[0]
    facts = ("card", "capability", "driver", "driver's CUDA", "torch", "cpu", "commit")
    lines = [f"# Layers on {first['card']}", ""]
    if first["rehearsed"]:
        lines += ["A rehearsal on tiny sizes: the program ran, and no time here means anything.", ""]
    lines += [", ".join(f"{name} {first[name]}" for name in facts), "", _state(rows), "", "## Verdicts", ""]
    lines += [*(f"- {verdict}" for verdict in found.values()), ""]
    for time_ in TITLES:
        groups = ratios(rows, time_)
        if any(ratio is not None for arms in groups.values() for ratio in arms.values()):
            arms = [arm for arm in _arms(rows) if any(group.get(arm) is not None for group in groups.values())]
            lines += [f"## A step over the frozen layer: {TITLES[time_]}", ""]
            lines += _table(["", *arms], ([where, *(g.get(arm) for arm in arms)] for where, g in groups.items()))
    fastest = _fastest(rows)
    if fastest:
        lines += ["## Our fastest strategies", ""]
        lines += _table(["", "pass", "strategy", "ms", "over frozen", "over ours by default"], fastest)
    others = [row for row in rows if row["kind"] not in ("layer", "strategy") and row.get("step ms")]
    names = ("arm", "step ms", "wall ms", "TFLOP/s", "GB/s", "tokens/s", "svd ms", "svd / auto", "top 8 found")
    lines += ["## Roofs, training steps, pre-launch", ""]
    lines += _table(list(names), ([row.get(name) for name in names] for row in others))
    for title, name in (("Failed", "error"), ("Left out", "left out")):
        found_rows = [row for row in rows if row[name] is not None]
        if found_rows:
            lines += [f"## {title}", "", *(f"- {row['key']}: {row[name]}" for row in found_rows), ""]
    return "\n".join(lines)


def _arms(rows: list[Row]) -> list[str]:
    return list(dict.fromkeys(row["arm"] for row in rows if row["kind"] == "layer" and row["arm"] != FROZEN))


def draw(rows: list[Row], path: Path) -> Path:
    """Bars over the frozen layer, one group a workload, of the first DRAWN. Raises ImportError where matplotlib is missing."""
    from benchmarks.support.plots import ratio_panels

    panels = {}
    for time_ in TIMES:
        groups = {
            _short(row): {arm: ratio for arm in SHOWN if (ratio := arms.get(arm)) is not None}
            for row, arms in _with_rows(rows, time_)[:DRAWN]
        }
        groups = {where: arms for where, arms in groups.items() if arms}
        if groups:
            panels[TITLES[time_]] = groups
    first = rows[0]
    title = f"A training step over a frozen nn.Linear on {first['card']}" + (
        ", rehearsed" if first["rehearsed"] else ""
    )
    return ratio_panels(panels, SHOWN, OURS, title, path)


def _with_rows(rows: list[Row], time_: str) -> list[tuple[Row, dict[str, float | None]]]:
    firsts = {workload_of(row): row for row in reversed(rows) if row["kind"] == "layer"}
    return [(firsts[where], arms) for where, arms in ratios(rows, time_).items()]


def _short(row: Row) -> str:
    extra = [f"r {row['r']}"] * (row["r"] != 16) + ["no dropout"] * (row["dropout"] == 0)
    return "\n".join([f"{row['K']}→{row['N']}", f"M {row['M']}, {row['dtype']}", *extra])


def report(folder: Path) -> dict[str, Verdict]:
    """Writes the files and returns the verdicts. ValueError where there are no rows."""
    rows = read_lines(folder / "rows.jsonl")
    if not rows:
        raise ValueError(f"{folder / 'rows.jsonl'} holds no rows")
    write_rows(rows, folder / "device.csv")
    text = text_of(rows)
    if any(ratio for arms in ratios(rows).values() for ratio in arms.values()):
        try:
            draw(rows, folder / "device.png")
        except ImportError as error:
            text += f"\nNo picture: {error}.\n"
    (folder / "device.md").write_text(text)
    return verdicts(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="DIR")
    options = parser.parse_args()
    for name, verdict in report(options.folder).items():
        print(f"{name}: {verdict}")


if __name__ == "__main__":
    main()
