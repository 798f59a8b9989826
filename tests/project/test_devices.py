"""Which device tests run on, with which backends, and how processes that share a card share the tests out."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support import devices

ROOT = Path(__file__).parents[2]


@pytest.fixture
def cards(monkeypatch):
    """Two cards, pretended."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(devices.triton_backend, "interpreted", lambda: False)


def test_devices_that_are_there(cards):
    assert devices.wanted_device("cpu") == torch.device("cpu")
    assert devices.wanted_device("cuda") == torch.device("cuda", 0)
    assert devices.wanted_device("cuda:1") == torch.device("cuda", 1)


@pytest.mark.parametrize(
    ("text", "words"), [("cuda:2", "sees 2 GPUs"), ("gpu", "wanted cpu, cuda or cuda:N"), ("mps", "wanted cpu, cuda")]
)
def test_devices_that_are_not(cards, text, words):
    with pytest.raises(pytest.UsageError, match=words):
        devices.wanted_device(text)


def test_the_interpreter_has_no_card(cards, monkeypatch):
    monkeypatch.setattr(devices.triton_backend, "interpreted", lambda: True)
    with pytest.raises(pytest.UsageError, match="TRITON_INTERPRET=1 runs Triton's kernels on the CPU; unset it"):
        devices.wanted_device("cuda")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card")
def test_no_card_is_an_error_in_words():
    command = [sys.executable, "-m", "pytest", "--device", "cuda", "tests/gpu/correct"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert "--device cuda: PyTorch" in done.stderr and "sees no GPU; --device cpu runs without one" in done.stderr


def test_what_cannot_run_on_a_card_is_skipped_with_the_reason(cards, monkeypatch):
    """It is there, to be seen in every report."""
    reasons = {"cuda": "the compiled part was built without CUDA", "triton": None, "reference": None}
    monkeypatch.setattr(devices, "why_not", lambda name, device: reasons[name])
    skipped, *others = devices.backends_on(torch.device("cuda", 0))
    assert others == ["triton", "reference"] and skipped.values == ("cuda",)
    assert skipped.marks[0].kwargs["reason"] == "backend cuda cannot run: the compiled part was built without CUDA"


def test_a_backend_is_asked_about_the_device():
    assert devices.why_not("reference", torch.device("cpu")) is None
    found = devices.why_not("triton", torch.device("cpu"))
    assert (found is None) == devices.triton_backend.interpreted()
    assert "cuda" not in devices.MADE_FOR["cpu"]


@pytest.mark.parametrize("name", devices.TAKES)
def test_what_is_refused(name):
    """The words are those of the backends; tests hold these to them."""
    for dtype in (*devices.TAKES["reference"], torch.float64):
        assert (devices.refusal(name, dtype, 24) is None) == (dtype in devices.TAKES[name])
    assert (devices.refusal(name, devices.plain_dtype(name), 257) is None) == (name in ("cpu", "reference"))


@pytest.mark.parametrize("count", [1, 2, 7, 8])
@pytest.mark.parametrize("heavy", [0, 3, 40])
def test_shards(heavy, count):
    """Every test is in one shard, heavy ones in the first, and the others even the work out."""
    tests = [i % 5 == 2 and i // 5 < heavy for i in range(200)]
    shards = devices.shards_of(tests, count)
    assert all(0 <= shard < count for shard in shards)
    assert all(shard == 0 for shard, is_heavy in zip(shards, tests, strict=True) if is_heavy)
    loads = [0] * count
    for shard, is_heavy in zip(shards, tests, strict=True):
        loads[shard] += devices.HEAVY_COSTS if is_heavy else 1
    # Nothing evens out more heavy tests than a shard's share.
    assert max(loads[1:], default=0) - min(loads) <= 1
    assert loads[0] <= max(max(loads[1:], default=loads[0]) + 1, devices.HEAVY_COSTS * sum(tests))


@pytest.mark.parametrize("text", ["", "1", "2/2", "-1/2", "a/b", "1/0"])
def test_shards_that_are_none(text):
    with pytest.raises(pytest.UsageError, match="wanted I/N with 0 <= I < N"):
        devices.wanted_shard(text)


def test_shards_by_their_text():
    assert devices.wanted_shard("0/1") == (0, 1)
    assert devices.wanted_shard("3/8") == (3, 8)
