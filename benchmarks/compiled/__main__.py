"""Whole models under torch.compile, checkpoints that keep P, and programs compiled ahead of time.

    OMP_NUM_THREADS=1 python -m benchmarks.compiled [--models Llama BERT] [--out benchmarks/results]

Tiny models of transformers, plain and adapted in every linear layer, train across launch in one compiled graph
(fullgraph=True), with dropout; their losses are held to eager ones. Nothing here is timed: the tables count. Written are
compiled.csv, the counts; compiled_checkpoints.csv; and compiled.md, all tables.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks.support.measure import environment, write_csv

from . import checkpoints, exports
from .counts import Phase, adapted, compiled, gap, trained
from .models import MODELS

DROPOUT = 0.25
# Inductor compiles C++ for every graph: it shows on one model that what stands for the others holds there.
BACKENDS = {"aot_eager": [*MODELS], "inductor": ["Llama"]}
# Losses are float32.
TOLERANCE = 1e-4

Row = dict[str, Any]


def rows_of(name: str, backend: str) -> list[Row]:
    """The plain and the adapted model, a row a phase."""
    whole = MODELS[name]
    model = adapted(whole, DROPOUT)
    eager = trained(model, model)
    plain, ours = compiled(whole.model(), backend), compiled(adapted(whole, DROPOUT), backend)

    def row(kind: str, phase: str, found: Phase, distance: float | str) -> Row:
        counts = {"graphs": found.graphs, "graph breaks": found.breaks, "recompilations": found.recompilations}
        return {"model": name, "backend": backend, "layers": kind, "phase": phase, **counts, "gap": distance}

    plain_rows = [row("plain", phase, found, "") for phase, found in plain.items()]
    return plain_rows + [row("adapted", phase, found, gap(found, eager[phase])) for phase, found in ours.items()]


def table(rows: list[Row]) -> str:
    """In Markdown."""

    def cell(value: Any) -> str:
        return f"{value:.3g}" if isinstance(value, float) else str(value)

    head, lines = list(rows[0]), [[cell(value) for value in row.values()] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in (head, ["---"] * len(head), *lines)) + "\n"


def wrong(rows: list[Row]) -> list[str]:
    """What a row shows that must not be: more breaks or compilations than the plain model's, or other losses."""
    plain = {(r["model"], r["backend"], r["phase"]): r for r in rows if r["layers"] == "plain"}
    found = []
    for row in rows:
        key = row["model"], row["backend"], row["phase"]
        if row["layers"] == "adapted":
            found += [
                f"{key}: {n} {row[n]}" for n in ("graphs", "graph breaks", "recompilations") if row[n] > plain[key][n]
            ]
            found += [f"{key}: losses {row['gap']} apart"] if row["gap"] > TOLERANCE else []
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.compiled", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=MODELS, default=[*MODELS], metavar="MODEL", help="some of them")
    parser.add_argument("--out", type=Path, help="folder for compiled.csv, compiled_checkpoints.csv and compiled.md")
    options = parser.parse_args(arguments)
    cases = [(n, backend) for backend, names in BACKENDS.items() for n in names if n in options.models]
    counts: list[Row] = []
    for name, backend in tqdm(cases, desc="whole models", file=sys.stderr):
        counts += rows_of(name, backend)
    kept = [r for _ in tqdm(range(1), desc="checkpoints", file=sys.stderr) for r in checkpoints.rows()]
    programs = [r for _ in tqdm(range(1), desc="programs", file=sys.stderr) for r in exports.rows()]
    about = ", ".join(f"{name} {value}" for name, value in environment().items())
    text = (
        f"Training across launch, compiled; gap: of losses to eager ones, relative.\n\n{table(counts)}\n"
        f"Kept between the passes, and FLOPs of a step ({checkpoints.SIZES}):\n\n{table(kept)}\n"
        f"Compiled ahead of time; gap: of the output to the eager block's.\n\n{table(programs)}\n{about}\n"
    )
    print(text)
    if options.out is not None:
        write_csv(options.out / "compiled.csv", counts)
        write_csv(options.out / "compiled_checkpoints.csv", kept)
        (options.out / "compiled.md").write_text(text)
    for line in wrong(counts):
        print(line, file=sys.stderr)
    return bool(wrong(counts))


if __name__ == "__main__":
    sys.exit(main())
