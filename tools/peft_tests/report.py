"""The table: outcomes of every file under every switch, fused calls, and what differs and why."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.support.measure import environment
from tools.peft_tests import compare
from tools.peft_tests.compare import Difference, Outcomes
from tools.peft_tests.runs import Test, counts

SWITCHES = {
    "accelerated": "PEFT's plain LoRA layers on the fused operator (`accelerated()`)",
    "loradash": "`DashLoraConfig` in the place of `LoraConfig`, before launch",
    "launched": "the same, every adapter that does not start as the identity launched at once, with Δσ ≠ 0",
}
PACKAGES = ("peft", "transformers", "accelerate", "torch", "torchao", "bitsandbytes")
COLUMNS = ("passed", "failed", "skipped", "unreachable")


def facts() -> dict[str, str]:
    return {**{name: installed(name) for name in PACKAGES}, **environment()}


def installed(name: str) -> str:
    try:
        return version(name)
    except ModuleNotFoundError:
        return "none"


def figures(tests: Iterable[Test]) -> dict[str, int]:
    """How many tests ended how; what PEFT expects to fail counts as skipped."""
    found = counts(tests)
    return {name: found[name] + (found["xfailed"] if name == "skipped" else 0) for name in COLUMNS}


def as_json(outcomes: Outcomes, found: list[Difference], about: dict[str, str]) -> str:
    rows: list[dict[str, Any]] = [
        {
            "file": file,
            "switch": switch,
            **figures(tests),
            "fused": compare.fused(tests),
            "gave_way": dict(compare.gave_way(tests).most_common()),
        }
        for (file, switch), tests in outcomes.items()
    ]
    differing = [{**one._asdict(), "reason": one.reason.why if one.reason else None} for one in found]
    return json.dumps({"about": about, "files": rows, "differences": differing}, indent=1, ensure_ascii=False) + "\n"


def as_markdown(outcomes: Outcomes, found: list[Difference], about: dict[str, str]) -> str:
    parts = [
        "# PEFT's own tests, with this library beneath them and without",
        "Made by `make peft-tests`. " + ", ".join(f"{name} {value}" for name, value in about.items()) + ".",
        "Outcomes are passed / failed / skipped / unreachable: the last failed after they had asked the Hugging Face hub, which "
        "this machine does not reach, and what PEFT expects to fail counts as skipped. A test that concerns other tuners alone "
        "is left out where LoRA-Dash takes LoRA's place.",
    ]
    for switch in SWITCHES:
        if any(on == switch for _, on in outcomes):
            parts += section(switch, outcomes, [one for one in found if one.switch == switch])
    return "\n\n".join(parts) + "\n"


def section(switch: str, outcomes: Outcomes, found: list[Difference]) -> list[str]:
    files = [file for file, on in outcomes if on == switch]
    differing = Counter(one.file for one in found)
    lines = [
        "| file | without | with | fused calls | calls on PEFT's path | differences |",
        "|---|---|---|---|---|---|",
    ]
    total = Counter[str]()
    for file in files:
        off, on = outcomes[file, "off"], outcomes[file, switch]
        others = compare.gave_way(on)
        total.update(others)
        # Beside each other stand the same tests.
        both = [one for _, one, other in compare.pairs(off, on) if other.outcome != "absent"]
        lines.append(
            f"| {file} | {cell(both)} | {cell(on)} | {compare.fused(on)} | {others.total()} | {differing[file]} |"
        )
    parts = [f"## {switch}: {SWITCHES[switch]}", "\n".join(lines)]
    if total:
        parts.append(
            "Calls on PEFT's path, by reason:\n\n" + "\n".join(f"- {n}: {why}" for why, n in total.most_common())
        )
    return [*parts, explained(found)]


def cell(tests: Iterable[Test]) -> str:
    return " / ".join(map(str, figures(tests).values()))


def explained(found: list[Difference]) -> str:
    if not found:
        return "No test ended otherwise."
    by_reason: dict[str, list[Difference]] = {}
    for one in found:
        by_reason.setdefault(one.reason.why if one.reason else "NOT EXPLAINED", []).append(one)
    lines = []
    for why, those in by_reason.items():
        lines.append(f"- {len(those)} in {', '.join(sorted({one.file for one in those}))}: {why}")
        if those[0].reason is None:
            lines += [f"  - `{one.test}`: {one.off} without, {one.on} with: {one.message[:200]!r}" for one in those]
    return "Tests that ended otherwise, by reason:\n\n" + "\n".join(lines)


def write(folder: Path, outcomes: Outcomes, found: list[Difference]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    about = facts()
    (folder / "peft_tests.md").write_text(as_markdown(outcomes, found, about))
    (folder / "peft_tests.json").write_text(as_json(outcomes, found, about))
