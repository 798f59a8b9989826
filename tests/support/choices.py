"""Which backend a card takes, on machines that are pretended. As a program it prints the table:

PYTHONPATH=.:tests python -m support.choices
"""

from __future__ import annotations

import contextlib
import importlib.machinery
import sys
import types
import warnings
from types import SimpleNamespace

import pytest
import torch

from loradash_kernels import notices
from loradash_kernels.backends import cards, cuda, extension, registry
from loradash_kernels.backends.triton import backend as triton
from loradash_kernels.backends.triton.target import triton_version

from .cards import OnCard, forward_call

KB = 1024
# Bytes of shared memory that a block may take.
CAPABILITIES = {
    (7, 5): 64 * KB,
    (8, 0): 163 * KB,
    (8, 6): 99 * KB,
    (8, 7): 163 * KB,
    (8, 9): 99 * KB,
    (9, 0): 227 * KB,
    (10, 0): 227 * KB,
    (10, 3): 227 * KB,
    (11, 0): 227 * KB,
    (12, 0): 99 * KB,
    (12, 1): 99 * KB,
    (13, 0): 227 * KB,
}
TRITONS = ("3.8.0", "3.3.1", "3.2.0", None)


def forget_devices():
    """What was learnt of a pretended device."""
    devices = (cards.architecture_of, cards.name_of, cards.capability_of)
    for cached in (*devices, triton._shared_limit):
        getattr(cached, "cache_clear", lambda: None)()


def forget_triton():
    """What was learnt of a pretended Triton."""
    triton.missing.cache_clear()
    triton_version.cache_clear()


def pretend_card(monkeypatch, capability, shared_limit=None):
    """PyTorch says that there is a card."""
    names = {"name": "a card", "major": capability[0], "minor": capability[1]}
    properties = SimpleNamespace(shared_memory_per_block_optin=shared_limit, **names)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device=None: properties)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "a card")
    monkeypatch.setattr(torch.cuda, "device", contextlib.nullcontext)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)


def _pretend_triton(monkeypatch, version):
    """The package as `missing` looks at it; without a version it is not installed."""
    package = None
    if version is not None:
        package = types.ModuleType("triton")
        package.__version__ = version
        package.__spec__ = importlib.machinery.ModuleSpec("triton", None)
    monkeypatch.setitem(sys.modules, "triton", package)
    forget_triton()


@contextlib.contextmanager
def pretended(capability, code=True, triton_version="3.8.0"):
    """A card, a compiled part built with CUDA that has code for it or not, and a Triton."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        forget_devices()
        pretend_card(monkeypatch, capability, CAPABILITIES[capability])
        compiled = SimpleNamespace(
            cuda_architectures=[800, 860, 890], cuda_max_width=256, cuda_runs_on=lambda index: code
        )
        monkeypatch.setattr(extension, "missing_reason", None)
        monkeypatch.setattr(extension, "compiled", lambda: compiled)
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
        monkeypatch.setattr(notices, "_given", set())
        cached = (cuda.missing, cuda._has_code, cuda._max_width)
        [f.cache_clear() for f in cached]
        _pretend_triton(monkeypatch, triton_version)
        yield
    [f.cache_clear() for f in cached]
    forget_triton()
    forget_devices()


def choice(capability, code=True, triton_version="3.8.0", dtype=torch.bfloat16, width=24):
    """The backend of a call on such a machine, and the warning where there is one."""
    with pretended(capability, code, triton_version), warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        name = registry.pick(forward_call(OnCard(dtype), width)).name
    return name, str(said[0].message) if said else None


def table():
    """Lines: a card a row, a machine a column."""
    machines = [(code, version) for code in (True, False) for version in TRITONS]
    head = [f"{'code' if code else 'no code'}, Triton {version or 'none'}" for code, version in machines]
    yield f"| bf16 | {' | '.join(head)} |"
    yield "|---" * (1 + len(head)) + "|"
    for capability in CAPABILITIES:
        names = [choice(capability, code, version)[0] for code, version in machines]
        yield f"| sm_{capability[0]}{capability[1]} | {' | '.join(names)} |"


if __name__ == "__main__":
    print("\n".join(table()))
    print(choice((8, 0), False, "3.2.0")[1], choice((7, 5))[1], choice((9, 0), width=300)[1], sep="\n")
