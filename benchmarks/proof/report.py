"""What the stages left, as files for others: `python -m benchmarks.proof.report FOLDER --out DIR [--rehearse]`.

FOLDER holds the state of a card. DIR receives proof.json, junit.xml, rows.csv, report.md, plots.png, log.txt, and layers.png
and measurements.json where layers were measured and tuned: at most 8 files below 16 MB.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.layers import device_report, verdicts

from . import documents, plots, schema
from .ledger import rows_in
from .state import Record, State, hash_of

# A log's last bytes are kept: eight stages of eight lanes stay below the limit of a file.
LOG_BYTES = 200_000
MEASUREMENTS = "measurements.json"


def gather(folder: Path, stages: Sequence[Any], rehearse: bool) -> dict[str, Any]:
    """proof.json, of the state in `folder` and the `stages` (of .name and .sources) that there should be."""
    state = State(folder).load()
    names = [stage.name for stage in stages]
    records = [state.records[name] for name in names if name in state.records]
    absent = [name for name in names if name not in state.records]
    stale = [s.name for s in stages if s.name not in absent and state.records[s.name].sources != hash_of(s.sources)]
    found = [
        {**dataclasses.asdict(record), "rows": [dataclasses.asdict(row) for row in rows_in(folder / record.name)]}
        for record in records
    ]
    judged = judge(found, rehearse)
    return {
        "schema": schema.NAME,
        "result": result_of(records, absent, stale, judged, rehearse),
        "rehearsal": rehearse,
        "facts": state.facts,
        "absent": absent,
        "stale": stale,
        "stages": found,
        "verdicts": judged,
    }


def result_of(
    records: Sequence[Record],
    absent: Sequence[str],
    stale: Sequence[str],
    verdicts: list[dict[str, Any]],
    rehearse: bool,
) -> str:
    """ "passed" where everything did; "unfinished" where a stage has yet to run; else "failed"."""
    if any(record.ending in ("failed", "over", "missing") for record in records):
        return "failed"
    if absent or stale or any(not record.finished for record in records):
        return "unfinished"
    return "passed" if schema.verdicts_hold(verdicts, rehearse) else "failed"


def judge(stages: Sequence[dict[str, Any]], rehearse: bool) -> list[dict[str, Any]]:
    """The verdicts over the rows of the benchmarks. Those of a rehearsal are computed and not judged."""
    found = []
    for name, verdict in verdicts.verdicts(bench_rows(stages)).items():
        outcome = {True: "passed", False: "failed", None: "not measured"}[verdict.holds]
        numbers = [{"value": n.value, "limit": n.limit, "where": n.where} for n in verdict.numbers]
        found.append(
            {
                "name": name,
                "rule": verdict.claim,
                "outcome": "rehearsed" if rehearse and numbers else outcome,
                "detail": str(verdict).removeprefix(f"{verdict.claim}: "),
                "numbers": numbers,
            }
        )
    return found


def bench_rows(stages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of the benchmarks as they wrote them."""
    return [row["values"] for stage in stages if stage["name"] == "bench" for row in stage["rows"] if row["values"]]


def logs(folder: Path) -> str:
    """The last of what every process printed, stage by stage."""
    parts = []
    for path in sorted(folder.glob("*/log-*.txt"), key=lambda path: path.stat().st_mtime):
        text = path.read_bytes()[-LOG_BYTES:].decode(errors="replace")
        parts.append(f"{path.relative_to(folder)}\n\n{text}\n")
    return "\n".join(parts)


def write(proof: dict[str, Any], folder: Path, out: Path) -> list[str]:
    """Writes the files; returns what could not be."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "proof.json").write_text(json.dumps(proof, indent=1))
    (out / "junit.xml").write_text(documents.junit(proof))
    (out / "rows.csv").write_text(documents.table(proof))
    (out / "log.txt").write_text(logs(folder))
    measurements = folder / "tune" / "table" / MEASUREMENTS
    if measurements.exists():
        (out / MEASUREMENTS).write_bytes(measurements.read_bytes())
    rows, parts, troubles = bench_rows(proof["stages"]), [documents.markdown(proof)], []
    made: dict[str, Callable[[Path], object]] = {"plots.png": lambda path: plots.draw(proof, path)}
    if rows:
        made["the tables of layers"] = lambda path: parts.append(layers_text(rows))
    if any(measured.values() for measured in device_report.ratios(rows).values()):
        made["layers.png"] = lambda path: device_report.draw(rows, path)
    for name, make in made.items():
        # Whatever happens to a picture, the rest of the results must not be lost.
        try:
            make(out / name)
        except Exception as error:
            troubles.append(f"{name} could not be made: {type(error).__name__}: {error}")
    (out / "report.md").write_text("\n".join([*parts, *troubles]) + "\n")
    return troubles


def layers_text(rows: list[dict[str, Any]]) -> str:
    """What the benchmarks say of their rows, as a part of the report."""
    return re.sub(r"^#", "##", device_report.text_of(rows), flags=re.M)


def main() -> int:
    from .stages import STAGES

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rehearse", action="store_true")
    options = parser.parse_args()
    proof = gather(options.folder, STAGES, options.rehearse)
    wrong = list(schema.problems(proof))
    for text in [*write(proof, options.folder, options.out), *wrong]:
        print(text)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
