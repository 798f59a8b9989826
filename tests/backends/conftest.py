"""A machine with a card, pretended; a cache of its own for each test."""

from __future__ import annotations

import pytest
from support.choices import forget_devices, pretend_card

from loradash_kernels import notices
from loradash_kernels.backends import cuda, tuning
from loradash_kernels.backends.measurements import ShippedTables
from loradash_kernels.backends.triton import backend as triton


@pytest.fixture
def card(monkeypatch):
    """Pretends that there is a card of a given capability, and that both GPU backends can run on it."""

    def pretend(*capability, shared_limit=None):
        forget_devices()
        pretend_card(monkeypatch, capability, shared_limit)
        monkeypatch.setattr(cuda, "missing", lambda: None)
        monkeypatch.setattr(cuda, "_has_code", lambda device: True)
        monkeypatch.setattr(triton, "missing", lambda: None)

    yield pretend
    forget_devices()


@pytest.fixture
def unwarned(monkeypatch):
    """Every warning is new."""
    monkeypatch.setattr(notices, "_given", set())


@pytest.fixture
def cache(tmp_path, monkeypatch, unwarned):
    """A folder for measurements, which is not there yet; and nothing is shipped."""
    monkeypatch.setenv("LORADASH_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("LORADASH_TUNE", raising=False)
    monkeypatch.setattr(tuning, "SHIPPED", ShippedTables(tmp_path / "shipped"))
    tuning.MEASURED.forget()
    yield tmp_path / "cache"
    tuning.MEASURED.forget()
