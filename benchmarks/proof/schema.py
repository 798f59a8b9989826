"""The shape of proof.json, as data, and what in a file does not have it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from .ledger import OUTCOMES

NAME = "loradash-kernels proof 1"
RESULTS = ("passed", "failed", "unfinished")
VERDICTS = ("passed", "failed", "not measured", "rehearsed")
NUMBER = (int, float)

# A type, a tuple of types, a set of the values that there are, a list of one element's shape, or a dict of fields.
ROW = {"name": str, "outcome": {*OUTCOMES}, "seconds": NUMBER, "detail": str, "values": dict}
STAGE = {
    "name": str,
    "ending": {"passed", "failed", "missing", "over", "cut"},
    "detail": str,
    "seconds": NUMBER,
    "budget": NUMBER,
    "starts": int,
    "sources": str,
    "rows": [ROW],
}
MEASURED = {"value": NUMBER, "limit": NUMBER, "where": str}
VERDICT = {"name": str, "rule": str, "outcome": {*VERDICTS}, "detail": str, "numbers": [MEASURED]}
PROOF = {
    "schema": {NAME},
    "result": {*RESULTS},
    "rehearsal": bool,
    "facts": dict,
    "absent": [str],
    "stale": [str],
    "stages": [STAGE],
    "verdicts": [VERDICT],
}


def verdicts_hold(verdicts: list[dict[str, Any]], rehearsal: bool) -> bool:
    """Whether all passed; a rehearsal judges no number, but it must have come to one."""
    outcomes = {verdict["outcome"] for verdict in verdicts}
    return "rehearsed" in outcomes if rehearsal else outcomes == {"passed"}


def problems(value: Any, shape: Any = PROOF, where: str = "proof") -> Iterator[str]:
    """What is wrong with a value, each with its place: "proof.stages[2].ending is 'done', wanted one of ..."."""
    if isinstance(shape, dict):
        if not isinstance(value, dict):
            yield f"{where} is {value!r}, wanted an object"
            return
        yield from (f"{where} lacks {name}" for name in shape if name not in value)
        yield from (f"{where} has {name}, which is not in the schema" for name in value if name not in shape)
        for name in shape.keys() & value.keys():
            yield from problems(value[name], shape[name], f"{where}.{name}")
    elif isinstance(shape, list):
        if not isinstance(value, list):
            yield f"{where} is {value!r}, wanted a list"
            return
        for place, element in enumerate(value):
            yield from problems(element, shape[0], f"{where}[{place}]")
    elif isinstance(shape, set):
        if value not in shape:
            yield f"{where} is {value!r}, wanted one of {sorted(shape)}"
    elif not isinstance(value, shape) or (isinstance(value, bool) and shape is not bool):
        yield f"{where} is {value!r}, wanted {shape}"
