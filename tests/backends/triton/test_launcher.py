"""Launching past Triton: when it is done and when not, and what the installed Triton's own kernels are given."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from loradash_kernels.backends.triton import backend

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed"),
    pytest.mark.skipif(backend.interpreted(), reason="the interpreter launches nothing past Triton"),
]

if importlib.util.find_spec("triton"):
    from support.plans import both_calls

    from loradash_kernels.backends.triton import launcher

ROOT = Path(__file__).parents[3]


def test_watched_launches_go_through_triton(launched, monkeypatch):
    knobs = pytest.importorskip("triton.knobs", reason="Triton 3.3 has its hooks elsewhere")

    call = both_calls(40, 64, 96, 8, 4)[0]
    for _ in range(2):
        backend.forward(call)
    repeated = len(launched.repeated)
    assert repeated and len(launched.by_triton) == 3

    def through_triton():
        launched.by_triton.clear()
        backend.forward(call)
        assert (len(launched.repeated) == repeated) == (len(launched.by_triton) == 3)
        return bool(launched.by_triton)

    for name, value in (("debug", True), ("launch_enter_hook", print), ("launch_exit_hook", print)):
        with monkeypatch.context() as patch:
            patch.setattr(knobs.runtime, name, value)
            assert through_triton(), name
    hooks = next(iter(backend.PLANS._plans.values())).steps[0].kernel.pre_run_hooks
    hooks.append(print)
    assert through_triton()
    hooks.clear()
    assert not through_triton()


def test_an_unknown_triton_launches_as_ever(launched, monkeypatch):
    from triton.runtime.jit import JITFunction

    monkeypatch.setattr(JITFunction, "run", lambda self, *args, **kwargs: None)
    launcher._obstacle.cache_clear()
    try:
        call = both_calls(40, 64, 96, 8, 4)[0]
        for _ in range(3):
            backend.forward(call)
        assert "another way" in launcher._obstacle()
        assert len(launched.by_triton) == 9 and not launched.repeated
    finally:
        launcher._obstacle.cache_clear()


def test_nothing_is_repeated_on_amd(monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "6.4")
    launcher._obstacle.cache_clear()
    try:
        assert "on AMD" in launcher.obstacle([])
    finally:
        launcher._obstacle.cache_clear()
    assert "list launches kernels" in launcher.obstacle([[]])


@pytest.mark.slow
@pytest.mark.parametrize("architecture", [80, 90])
def test_real_kernels_get_the_arguments_that_triton_gives_them(architecture):
    """Compiled for a card, up to the launcher: the installed Triton's own launches beside the repeated ones."""
    command = [sys.executable, "-m", "tests.support.repeated_launches", str(architecture)]
    done = subprocess.run(command, env=dict(os.environ), capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "launches are repeated" in done.stdout and "one_launch_forward" in done.stdout
