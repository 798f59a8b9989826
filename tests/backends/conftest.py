"""A machine with a card, pretended; a cache of its own for each test."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace

import pytest
import torch

from loradash_kernels import notices
from loradash_kernels.backends import cards, cuda, tuning
from loradash_kernels.backends.measurements import SHIPPED_FOLDER
from loradash_kernels.backends.triton import backend as triton


@pytest.fixture
def card(monkeypatch):
    """Pretends that there is a card of a given capability, and that both GPU backends can run on it."""

    def forget():
        devices = (cards.architecture_of, cards.name_of, cards.capability_of)
        for cached in (*devices, triton.architecture_of, triton._shared_limit):
            getattr(cached, "cache_clear", lambda: None)()

    def pretend(*capability, shared_limit=None):
        forget()
        names = {"name": "a card", "major": capability[0], "minor": capability[1]}
        properties = SimpleNamespace(shared_memory_per_block_optin=shared_limit, **names)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device=None: properties)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "a card")
        monkeypatch.setattr(torch.cuda, "device", contextlib.nullcontext)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
        monkeypatch.setattr(cuda, "missing", lambda: None)
        monkeypatch.setattr(cuda, "_has_code", lambda device: True)
        monkeypatch.setattr(triton, "missing", lambda: None)

    yield pretend
    forget()


@pytest.fixture
def unwarned(monkeypatch):
    """Every warning is new."""
    monkeypatch.setattr(notices, "_given", set())


@pytest.fixture
def cache(tmp_path, monkeypatch, unwarned):
    """A folder for measurements, which is not there yet; and nothing is shipped."""
    monkeypatch.setenv("LORADASH_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("LORADASH_TUNE", raising=False)
    tuning.MEASURED.forget()
    tuning.SHIPPED.forget(tmp_path / "shipped")
    yield tmp_path / "cache"
    tuning.MEASURED.forget()
    tuning.SHIPPED.forget(SHIPPED_FOLDER)
