"""A machine with a card, pretended; a cache of its own for each test."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace

import pytest
import torch

from loradash_kernels import notices
from loradash_kernels.backends import cuda, tuning
from loradash_kernels.backends.triton import backend as triton


@pytest.fixture
def card(monkeypatch):
    """Pretends that there is a card of a given capability, and that both GPU backends can run on it."""

    def forget():
        triton.architecture_of.cache_clear()
        triton._shared_limit.cache_clear()

    def pretend(*capability, shared_limit=None):
        forget()
        properties = SimpleNamespace(shared_memory_per_block_optin=shared_limit)
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
    """A folder for measurements, which is not there yet."""
    monkeypatch.setenv("LORADASH_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("LORADASH_TUNE", raising=False)
    tuning.MEASURED.forget()
    yield tmp_path / "cache"
    tuning.MEASURED.forget()
