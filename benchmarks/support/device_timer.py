"""A timer for pytest-benchmark whose stamps subtract to seconds of the device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from loradash_kernels.timing import Stopwatch


@dataclass(frozen=True)
class Stamp:
    """A moment between two calls: before the flush and the spin that precede the next, and after them."""

    stopwatch: Stopwatch
    before: Any
    after: Any

    def __sub__(self, earlier: Stamp) -> float:
        """Seconds from the end of the earlier spin to this moment: what ran in between, without its launching."""
        return 1e-3 * self.stopwatch.elapsed(earlier.after, self.before)


class DeviceTimer:
    """What stands for time.perf_counter in `benchmark.pedantic` on a GPU. `benchmark(...)` compares stamps, which these are
    not for."""

    def __init__(self, stopwatch: Stopwatch) -> None:
        self.stopwatch = stopwatch
        self.__name__ = "device events"

    def __call__(self) -> Stamp:
        before = self.stopwatch.stamp()
        self.stopwatch.flush()
        self.stopwatch.spin()
        return Stamp(self.stopwatch, before, self.stopwatch.stamp())
