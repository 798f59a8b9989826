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
from tools.peft_tests.suite import ABOUT

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
            "calls": dict(compare.calls(tests).most_common()),
        }
        for (file, switch), tests in outcomes.items()
    ]
    explained = Counter((one.switch, one.reason.why) for one in found if one.reason)
    return (
        json.dumps(
            {
                "about": about,
                "files": rows,
                "explained": [{"switch": on, "why": why, "tests": count} for (on, why), count in explained.items()],
                "not explained": [one._asdict() for one in found if one.reason is None],
            },
            indent=1,
            ensure_ascii=False,
        )
        + "\n"
    )


def as_markdown(outcomes: Outcomes, found: list[Difference], about: dict[str, str]) -> str:
    parts = [
        "# PEFT's own tests, with this library beneath them and without",
        "Made by `make peft-tests`. " + ", ".join(f"{name} {value}" for name, value in about.items()) + ".",
        "Outcomes are passed / failed / skipped / unreachable: the last failed after they had asked the Hugging Face hub, which "
        "this machine does not reach, and what PEFT expects to fail counts as skipped. Tests for the "
        "configuration classes of other tuners alone are left out.",
    ]
    for switch in ABOUT:
        if any(on == switch for _, on in outcomes):
            parts += section(switch, outcomes, [one for one in found if one.switch == switch])
    return "\n\n".join(parts) + "\n"


def section(switch: str, outcomes: Outcomes, found: list[Difference]) -> list[str]:
    differing, total = Counter(one.file for one in found), Counter[str]()
    lines = ["| file | without | with | fused calls | beside the base | PEFT's path | differences |", "|---" * 7 + "|"]
    for file in (file for file, on in outcomes if on == switch):
        tests = outcomes[file, switch]
        calls = compare.calls(tests)
        total.update(calls)
        how = Counter[str]()
        for way, count in calls.items():
            how[way.split(":")[0]] += count
        lines.append(
            f"| {file} | {cell(outcomes[file, 'off'])} | {cell(tests)} | {how['fused']} | {how['beside the base']} "
            f"| {how['PEFT']} | {differing[file]} |"
        )
    parts = [f"## {switch}: {ABOUT[switch]}", "\n".join(lines)]
    reasons = [f"- {count}: {way}" for way, count in total.most_common() if way != "fused"]
    if reasons:
        parts.append("Calls that did not run fused, by reason:\n\n" + "\n".join(reasons))
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
