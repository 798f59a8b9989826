"""Differences that have a reason: which tests end otherwise under a switch, and why that is right.

A reason that no test needs any more is an error of a whole run, as a difference without one is.
"""

from __future__ import annotations

import re
from typing import NamedTuple


class Reason(NamedTuple):
    switch: str
    file: str
    test: str
    """A regular expression that the end of a test's name matches."""
    message: str
    """One that is found in what the test said, so that the same test failing otherwise is a difference again."""
    why: str

    def explains(self, switch: str, file: str, test: str, message: str) -> bool:
        return (
            (switch, file) == (self.switch, self.file)
            and re.search(f"(?:{self.test})$", test) is not None
            and re.search(self.message, message) is not None
        )


REASONS: tuple[Reason, ...] = ()
