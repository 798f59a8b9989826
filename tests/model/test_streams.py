"""The thread beside training: on a pretended card it works on streams of its own."""

from __future__ import annotations

import contextlib
import threading

import pytest
import torch
from loradash import DashConfig, SpectralCache, apply_dash
from loradash.streams import SideStreams, borrow
from torch import nn

CARDS = [torch.device("cuda", 0), torch.device("cuda", 1)]


class Stream:
    def __init__(self, said, name):
        self.said, self.name = said, name

    def wait_stream(self, other):
        self.said.append(f"{self.name} waits for {other.name}")


class OnCard(torch.Tensor):
    """A tensor that says it lies on a card."""

    is_cuda, device = True, CARDS[0]

    def detach(self):
        return self

    def record_stream(self, stream):
        stream.said.append(f"lent to {stream.name}")


@pytest.fixture
def said(monkeypatch):
    """What happens to streams, in order. Each thread has current ones of its own."""
    said, entered = [], threading.local()

    def current(device):
        return vars(entered).get(str(device)) or Stream(said, f"main {device}")

    @contextlib.contextmanager
    def enter(stream):
        vars(entered)[stream.name.removeprefix("side ")] = stream
        said.append(f"enter {stream.name}")
        yield
        said.append(f"leave {stream.name}")
        del vars(entered)[stream.name.removeprefix("side ")]

    monkeypatch.setattr("torch.cuda.Stream", lambda device: Stream(said, f"side {device}"))
    monkeypatch.setattr("torch.cuda.current_stream", current)
    monkeypatch.setattr("torch.cuda.stream", enter)
    return said


def test_side_streams_begin_after_the_programs_own(said):
    streams = SideStreams([*CARDS, CARDS[0], torch.device("cpu")])
    with streams.entered():
        said.append("work")
    begin = ["side cuda:0 waits for main cuda:0", "side cuda:1 waits for main cuda:1"]
    assert said == [*begin, "enter side cuda:0", "enter side cuda:1", "work", "leave side cuda:1", "leave side cuda:0"]


def test_without_a_card_there_are_none(said):
    with SideStreams([torch.device("cpu")]).entered():
        pass
    w = torch.randn(3, 4).t()
    assert said == [] and torch.equal(borrow(nn.Parameter(w)), w) and not borrow(nn.Parameter(w)).requires_grad


def test_what_is_borrowed_is_kept_for_the_current_stream(said):
    with SideStreams(CARDS[:1]).entered():
        assert borrow(torch.randn(3, 4).as_subclass(OnCard)).is_cuda
    assert said[2:-1] == ["lent to side cuda:0"]


def test_the_background_reads_on_side_streams(said, tmp_path, monkeypatch):
    """The streams are made by the program's thread, and entered by the one beside it."""
    model = apply_dash(nn.Sequential(nn.Linear(8, 6)), DashConfig(r=2, directions=2))
    threads = []

    def streams(devices):
        assert {d.type for d in devices} == {"cpu"}
        threads.append(threading.current_thread().name)
        return SideStreams(CARDS[:1])

    monkeypatch.setattr("loradash.background.SideStreams", streams)
    real = SpectralCache.has

    def has(cache, weight):
        said.append(f"look on {torch.cuda.current_stream(CARDS[0]).name}")
        return real(cache, weight)

    monkeypatch.setattr(SpectralCache, "has", has)
    cache = SpectralCache(tmp_path)
    cache.keep(model[0].weight)
    assert cache.start(model).wait()
    assert threads == [threading.current_thread().name]
    assert said == [
        "side cuda:0 waits for main cuda:0",
        "enter side cuda:0",
        "look on side cuda:0",
        "leave side cuda:0",
    ]
