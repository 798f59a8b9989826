"""The versions of PEFT that this front end is tested with, and what differs between them."""

from __future__ import annotations

import peft

OLDEST, BELOW = (0, 19, 1), (0, 22)
"""PEFT from the first on and below the second."""


def check_version(version: str) -> None:
    """Raises ImportError for a version of PEFT outside the range; releases before a version count as that version."""
    found = tuple(int(part) for part in version.split("+")[0].split(".")[:3] if part.isdigit())
    if found < OLDEST or found[:2] >= BELOW:
        oldest, below = (".".join(map(str, bound)) for bound in (OLDEST, BELOW))
        raise ImportError(
            f"loradash.integrations.peft works with peft from {oldest} on and below {below}, and {version} is installed: "
            f"pip install 'peft>={oldest},<{below}'"
        )


check_version(peft.__version__)
