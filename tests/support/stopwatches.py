"""A stopwatch on a fake clock, which writes down what is done with it."""

from __future__ import annotations

import collections
from collections.abc import Callable


class FakeStopwatch:
    """Milliseconds pass when calls say so; flush and spin take their own. events: what happened, in order."""

    def __init__(self, flush: float = 0.0, spin: float = 0.0) -> None:
        self.now = 0.0
        self.events: list[str] = []
        self._takes = {"flush": flush, "spin": spin}

    def flush(self) -> None:
        self.events.append("flush")
        self.now += self._takes["flush"]

    def spin(self) -> None:
        self.events.append("spin")
        self.now += self._takes["spin"]

    def stamp(self) -> float:
        self.events.append("stamp")
        return self.now

    def elapsed(self, start: float, end: float) -> float:
        return end - start

    def arm(self, name: str, *takes: float) -> Callable[[], None]:
        """A call that takes the given milliseconds in turn, again and again."""
        turns = collections.deque(takes)

        def call() -> None:
            self.events.append(name)
            self.now += turns[0]
            turns.rotate(-1)

        return call
