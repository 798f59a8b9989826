"""A stopwatch without a device: candidates take the milliseconds that a test says, and everything is written down."""

from __future__ import annotations


class Scripted:
    """A stopwatch, and `run`, which runs a candidate: it takes `times[name]`, or raises it."""

    def __init__(self, **times):
        self.times, self.now, self.events = times, 0.0, []

    def flush(self):
        self.events.append("flush")

    def spin(self):
        self.events.append("spin")

    def stamp(self):
        self.events.append("stamp")
        return self.now

    def elapsed(self, start, end):
        return end - start

    def run(self, name):
        self.events.append(name)
        if isinstance(self.times[name], Exception):
            raise self.times[name]
        self.now += self.times[name]
