"""Outcomes under a switch beside those without it, test by test."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from tools.peft_tests.explained import REASONS, Reason
from tools.peft_tests.runs import Test

ABSENT = Test("", "absent", "", 0.0, {})
Outcomes = Mapping[tuple[str, str], list[Test]]
"""(file, switch) -> its tests."""


class Difference(NamedTuple):
    file: str
    switch: str
    test: str
    off: str
    on: str
    message: str
    reason: Reason | None


def differences(outcomes: Outcomes) -> list[Difference]:
    """Every test that ended otherwise under a switch than without it, with its reason where there is one."""
    found = []
    for (file, switch), tests in outcomes.items():
        if switch != "off":
            found += [
                Difference(
                    file,
                    switch,
                    name,
                    off.outcome,
                    on.outcome,
                    said(off, on),
                    reason(switch, name, said(off, on)),
                )
                for name, off, on in pairs(outcomes[file, "off"], tests)
                if off.outcome != on.outcome
            ]
    return found


def pairs(off: Iterable[Test], on: Iterable[Test]) -> list[tuple[str, Test, Test]]:
    """(name, without, with) of every test of either."""
    before, after = {test.test: test for test in off}, {test.test: test for test in on}
    return [(name, before.get(name, ABSENT), after.get(name, ABSENT)) for name in {**before, **after}]


def said(off: Test, on: Test) -> str:
    return on.message or off.message


def reason(switch: str, test: str, message: str) -> Reason | None:
    return next((one for one in REASONS if one.explains(switch, test, message)), None)


def stale(found: Iterable[Difference]) -> list[Reason]:
    """Reasons that explain nothing of a whole run."""
    used = {difference.reason for difference in found}
    return [one for one in REASONS if one not in used]


def calls(tests: Iterable[Test]) -> Counter[str]:
    """How many calls of layers ran in which way, over all tests."""
    total = Counter[str]()
    for test in tests:
        total.update(test.calls)
    return total
