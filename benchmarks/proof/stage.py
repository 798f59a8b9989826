"""What a stage is: a command, a budget, and how its results are read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .ledger import Row, rows_in

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Context:
    """Where a proof runs, and on what. facts: what the doctor found; folder: where the state of this card lies."""

    folder: Path
    facts: Mapping[str, Any]
    rehearse: bool = False

    def of(self, stage: str) -> Path:
        return self.folder / stage

    def rows(self, stage: str) -> list[Row]:
        """Every unit of a stage that has ended, in whichever lane."""
        return rows_in(self.of(stage))


@dataclass(frozen=True)
class Turn:
    """One start of a stage's process: the seconds that it may take, and which of how many that run side by side it is."""

    seconds: float
    lane: int = 0
    lanes: int = 1


@dataclass(frozen=True)
class Missing:
    """A stage has no command here; reason: why, in words."""

    reason: str


@dataclass(frozen=True)
class Command:
    """A program and what is added to its environment."""

    argv: list[str]
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Stage:
    """One part of the proof.

    budget: seconds for all of its calls together. rehearsal: the same where the CPU stands in for the card.
    command: what runs in a turn, or Missing.
    complete: whether this exit code says that nothing is left to do. A stage that is not complete is started again, as
        long as that adds rows.
    lanes: how many processes share the work.
    sources: paths below the root that decide the result. It is repeated when they change.
    patience: seconds without a sign of life (a row, a byte of output) after which its process is taken for hung.
    elastic: its work is as much as fits: it is through when its budget is used.
    fruitless: how many starts in a row may add no row.
    least: seconds below which it is not worth starting.
    """

    name: str
    budget: float
    rehearsal: float
    command: Callable[[Context, Turn], Command | Missing]
    complete: Callable[[int], bool] = lambda code: code == 0
    lanes: Callable[[Context], int] = lambda context: 1
    sources: tuple[str, ...] = ()
    patience: float = 120.0
    elastic: bool = False
    fruitless: int = 0
    least: float = 5.0
