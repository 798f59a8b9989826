"""proof.json as others want it: JUnit for machines, CSV for spreadsheets, a report and the last lines on the screen for people."""

from __future__ import annotations

import csv
import io
import re
from typing import Any
from xml.etree import ElementTree

from .screen import clock

Proof = dict[str, Any]
UNPRINTABLE = re.compile(r"\x1b\[[0-9;]*m|[^\t\n\r\x20-\ud7ff\ue000-\ufffd]")
LONGEST_DETAIL = 1500


def plain(text: str) -> str:
    """Without what XML cannot hold and what colours terminals."""
    return UNPRINTABLE.sub("", text)


def junit(proof: Proof) -> str:
    """A suite for each stage and one for the verdicts."""
    root = ElementTree.Element("testsuites", name="gpu-proof")
    for stage in proof["stages"]:
        suite = ElementTree.SubElement(root, "testsuite", name=stage["name"], time=f"{stage['seconds']:.3f}")
        for row in stage["rows"]:
            add_case(suite, stage["name"], row["name"], row["outcome"], row["detail"], row["seconds"])
        if stage["ending"] in ("failed", "over", "cut", "missing"):
            outcome = "missing" if stage["ending"] == "missing" else "failed"
            add_case(suite, stage["name"], "the stage itself", outcome, f"{stage['ending']}: {stage['detail']}")
    suite = ElementTree.SubElement(root, "testsuite", name="verdicts")
    for verdict in proof["verdicts"]:
        outcome = {"failed": "failed", "not measured": "missing"}.get(verdict["outcome"], "passed")
        add_case(suite, "verdicts", verdict["name"], outcome, f"{verdict['rule']}: {verdict['detail']}")
    for suite in root:
        suite.set("tests", str(len(suite)))
        suite.set("failures", str(len(suite.findall("testcase/failure"))))
        suite.set("skipped", str(len(suite.findall("testcase/skipped"))))
    ElementTree.indent(root)
    return ElementTree.tostring(root, encoding="unicode")


def add_case(suite: ElementTree.Element, room: str, name: str, outcome: str, detail: str, seconds: float = 0) -> None:
    case = ElementTree.SubElement(suite, "testcase", classname=room, name=plain(name), time=f"{seconds:.3f}")
    kind = {"failed": "failure", "missing": "skipped"}.get(outcome)
    if kind:
        first = plain(detail).strip().splitlines()[:1]
        ElementTree.SubElement(case, kind, message="".join(first)).text = plain(detail)


def table(proof: Proof) -> str:
    """Every measured row as CSV: its stage, name and values; a column for each value that any row has."""
    rows = [(stage["name"], row) for stage in proof["stages"] for row in stage["rows"] if row["values"]]
    columns = dict.fromkeys(name for _, row in rows for name in row["values"])
    out = io.StringIO()
    writer = csv.writer(out)
    writer.writerow(["stage", "unit", "outcome", *columns])
    for stage, row in rows:
        writer.writerow([stage, row["name"], row["outcome"], *(row["values"].get(name, "") for name in columns)])
    return out.getvalue()


def title(proof: Proof) -> str:
    card = proof["facts"].get("card")
    return "rehearsal on the CPU: no card ran anything" if proof["rehearsal"] else f"proof on {card['name']}"


def markdown(proof: Proof) -> str:
    """The report: verdicts first, then stages, then everything that failed or was not measured."""
    facts = proof["facts"]
    lines = [f"# {title(proof)}", "", f"Result: **{proof['result']}**.", ""]
    if proof["rehearsal"]:
        lines += [
            "Times of a rehearsal mean nothing: its verdicts are computed, to see that they can be, and not judged.",
            "",
        ]
    if proof["stale"]:
        lines += [f"The sources have changed since these stages ran: {', '.join(proof['stale'])}.", ""]
    if proof["absent"]:
        lines += [f"These stages were not run: {', '.join(proof['absent'])}.", ""]
    lines += [
        "## Verdicts",
        "",
        *(f"- {v['name']}: {v['rule']}. **{v['outcome']}**: {v['detail']}" for v in proof["verdicts"]),
    ]
    lines += ["", "## Stages", "", "| stage | ended | seconds | budget | |", "|---|---|---|---|---|"]
    for s in proof["stages"]:
        first = s["detail"].splitlines()[0] if s["detail"] else ""
        lines.append(f"| {s['name']} | {s['ending']} | {s['seconds']:.0f} | {s['budget']:.0f} | {cell(first)} |")
    lines += ["", "## Where", "", "| | |", "|---|---|"]
    lines += [f"| {name} | {cell(str(value))} |" for name, value in facts.items() if value is not None]
    for outcome, head in (("failed", "Failed"), ("missing", "Not measured")):
        lines += ["", f"## {head}", ""]
        found = [(s["name"], row) for s in proof["stages"] for row in s["rows"] if row["outcome"] == outcome]
        lines += [f"- {stage}, `{row['name']}`{quoted(row['detail'])}" for stage, row in found] or ["Nothing."]
    return "\n".join(lines) + "\n"


def cell(text: str) -> str:
    return plain(text).replace("|", "\\|").replace("\n", " ")


def quoted(text: str) -> str:
    text = plain(text).strip()[:LONGEST_DETAIL]
    if "\n" not in text:
        return f": {text}" if text else ""
    return "\n\n" + "\n".join(f"      {line}" for line in text.splitlines()) + "\n"


def summary(proof: Proof) -> str:
    """What the screen shows at the end."""
    lines = [f"{title(proof)}: {proof['result']}", ""]
    for s in proof["stages"]:
        planted = [row["name"] for row in s["rows"] if "planted" in row["name"] and row["outcome"] == "passed"]
        first = s["detail"].splitlines()[0] if s["detail"] else ""
        found = f"; planted faults found: {len(planted)}" if planted else ""
        lines.append(
            f"  {s['name']:10} {clock(s['seconds']):>6} of {clock(s['budget']):>5}  {s['ending']:8} {first}{found}"
        )
    lines += [f"  {name:10} {'':15}  not run" for name in proof["absent"]]
    lines.append("")
    lines += [f"  {v['name']:16} {v['outcome']}: {v['rule']}: {v['detail']}" for v in proof["verdicts"]]
    return "\n".join(lines)
