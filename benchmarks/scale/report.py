"""The table of schemes and cells, and that of bytes, as rows and as a page."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tests.support.scale import CELLS, badness

NAMES = {
    "ddp": "DDP",
    "fsdp1": "FSDP1",
    "fsdp2": "FSDP2",
    "tp2": "TP 2",
    "tp2_fsdp2": "TP x FSDP 2x2",
    "zero2": "ZeRO-2",
    "zero3": "ZeRO-3",
}
HEADINGS = {"load": "load elsewhere"}
FROZEN = "frozen"


def rows(cells: Mapping[str, Any], counts: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One a cell, and one a training of which the bytes were counted."""
    blank = dict.fromkeys(
        ("gap", "tolerance", "compared", "error", "bytes", "modelled bytes", "over frozen", "calls"), ""
    )
    found = []
    for scheme, results in cells.items():
        for cell in CELLS:
            values = {key: results[cell][key] for key in ("gap", "tolerance", "compared", "error")}
            found.append({"scheme": NAMES[scheme], "what": HEADINGS.get(cell, cell), **blank, **values})
    for scheme, trainings in counts.items():
        for training, count in trainings.items():
            sent = sum(count["bytes"].values())
            values = {
                "bytes": sent,
                "modelled bytes": count["modelled"] or "",
                "over frozen": sent / sum(trainings[FROZEN]["bytes"].values()),
                "calls": " ".join(f"{kind}:{n}" for kind, n in sorted(count["calls"].items())),
            }
            found.append({"scheme": NAMES[scheme], "what": f"bytes, {training}", **blank, **values})
    return found


def page(
    cells: Mapping[str, Any], counts: Mapping[str, Any], left_out: Mapping[str, str], about: Mapping[str, str]
) -> str:
    """Both tables in Markdown."""
    schemes = [*cells, *left_out]
    lines = [
        "Largest gap to one process in every cell, over what is allowed. Losses are absolute (they are near 1), trained tensors and",
        "outputs relative to the largest element:",
        "",
        _row(["", *(NAMES[s] for s in schemes)]),
        _row(["---"] * (len(schemes) + 1)),
    ]
    for cell in CELLS:
        lines.append(_row([HEADINGS.get(cell, cell), *(_cell(cells, s, cell) for s in schemes)]))
    lines += [f"\n{NAMES[s]} did not run: {why}." for s, why in left_out.items()]
    lines += [
        "",
        "Bytes of the whole tensors of one process's collectives in a training step (what an all-gather gives, a reduce-scatter takes),",
        "in brackets over the frozen model, of which the head trains, under the same scheme:",
        "",
        _row(["", *(NAMES[s] for s in counts)]),
        _row(["---"] * (len(counts) + 1)),
    ]
    trainings = next(iter(counts.values()), {})
    lines += [_row([training, *(_bytes(counts[s], training) for s in counts)]) for training in trainings]
    lines += ["", ", ".join(f"{key} {value}" for key, value in about.items()), ""]
    return "\n".join(lines)


def _row(values: list[str]) -> str:
    return f"| {' | '.join(values)} |"


def _cell(cells: Mapping[str, Any], scheme: str, cell: str) -> str:
    if scheme not in cells:
        return "not run"
    result = cells[scheme][cell]
    if result["error"] is not None:
        return "failed"
    text = f"{result['gap']:.1e} / {result['tolerance']:.0e}"
    return text if badness(result) <= 1 else f"{text}, too far"


def _bytes(trainings: Mapping[str, Any], training: str) -> str:
    sent, frozen = (sum(trainings[name]["bytes"].values()) for name in (training, FROZEN))
    return f"{sent:,} ({sent / frozen:.2f})"
