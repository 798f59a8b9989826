"""Sizes for the device: what a card is given, and what the rehearsal on the CPU has time for."""

from __future__ import annotations

import pytest
from support.sizes import CARD, REHEARSAL


@pytest.fixture(scope="session")
def sizes(device):
    return CARD if device.type == "cuda" else REHEARSAL
