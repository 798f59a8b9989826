"""Sizes for the device: what a card is given, and what the rehearsal on the CPU has time for; and every way to compute."""

from __future__ import annotations

import functools

import pytest
from support.devices import wanted_device
from support.matrix import ways_on
from support.sizes import CARD, REHEARSAL


def pytest_generate_tests(metafunc):
    if "way" in metafunc.fixturenames:
        metafunc.parametrize("way", _ways(metafunc.config.getoption("device") or "cpu"), indirect=True)


@functools.cache
def _ways(device):
    return ways_on(wanted_device(device))


@pytest.fixture(scope="session")
def sizes(device):
    return CARD if device.type == "cuda" else REHEARSAL


@pytest.fixture
def way(request, device):
    """A backend of the device, a dtype, and a tile or strategy of its own."""
    return request.param
