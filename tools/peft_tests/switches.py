"""What stands beneath PEFT's tests: nothing, the accelerator, or our tuner in the place of LoraConfig."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest


class Switch:
    """PEFT alone. The others extend it."""

    def concerns(self, item: pytest.Item) -> bool:
        """Whether a test that was selected can reach what the switch turns on."""
        return True

    def name(self, test: str) -> str:
        """A test's name as PEFT's own run has it."""
        return test

    def begin(self) -> None:
        """Before a test."""

    def end(self) -> dict[str, Any]:
        """After it: {"fused": calls, "gave_way": {reason: calls}}."""
        return {"fused": 0, "gave_way": {}}


SWITCHES: dict[str, Callable[[], Switch]] = {"off": Switch}
