"""Three times of a layer: what is timed, and that what fails is left out and told."""

from __future__ import annotations

import functools

import pytest
import torch

from benchmarks.layers import meter as meters
from benchmarks.layers.meter import CardLost, Meter, products_in, said
from benchmarks.layers.variants import FACTORED, FROZEN, OURS, build
from loradash_kernels.timing import ArmError, HostStopwatch


@pytest.fixture
def meter():
    return Meter(torch.device("cpu"), HostStopwatch(), seconds=0.2, least=2, most=3)


def test_an_arm_that_fails_is_left_out(meter):
    def bad():
        raise torch.cuda.OutOfMemoryError("Tried to allocate 20.00 GiB")

    found = meter.measure({"good": lambda: None, "bad": bad, "also good": lambda: None})
    assert found.samples.keys() == {"good", "also good"}
    assert found.errors == {"bad": "OutOfMemoryError: Tried to allocate 20.00 GiB"}


def test_where_all_fail_nothing_is_measured(meter):
    found = meter.measure({"bad": lambda: 1 / 0})
    assert found.samples == {} and found.errors["bad"].startswith("ZeroDivisionError") and found.shortest == 1.0


def test_passes_time_forward_and_backward_apart(meter):
    cases = build((8, 16, 24), torch.float32, [FROZEN, FACTORED, OURS])
    found = meter.passes(cases)
    assert all(found[pass_].samples.keys() == cases.keys() for pass_ in ("forward", "backward", "step"))
    assert not any(measured.errors for measured in found.values())
    assert all(leaf.grad is None for case in cases.values() for leaf in case.leaves)


def test_passes_leave_out_what_no_arm_takes(meter):
    cases = build((8, 16, 24), torch.float32, [FROZEN, OURS])
    found = meter.passes(cases, lambda name, pass_: pass_ == "forward" or (pass_ == "backward" and name == OURS))
    assert {pass_: set(measured.samples) for pass_, measured in found.items()} == {
        "forward": {FROZEN, OURS},
        "backward": {OURS},
    }


def test_wall_time_is_of_one_step(meter, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(meters.HostStopwatch, "stamp", lambda self: now[0])

    def step():
        now[0] += 0.004

    assert meter.wall({"a": step}, milliseconds=4.0).samples["a"].median == pytest.approx(4.0)
    assert round(now[0] / 0.004) % 5 == 0, "five steps back to back"


def test_graphs_need_a_card(meter):
    assert meter.graphs({"a": lambda: None}).errors == {"a": "a CUDA graph needs a card"}


def test_an_error_in_a_row_is_short_and_its_own():
    error = ArmError("a", ValueError("first\n  second " + 1000 * "x"))
    error.__cause__ = ValueError("first\n  second " + 1000 * "x")
    assert said(error).startswith("ValueError: first second xxx") and len(said(error)) < 450


def test_settings_of_products_are_put_back():
    matmul = torch.backends.cuda.matmul
    before = matmul.allow_tf32, matmul.allow_bf16_reduced_precision_reduction
    with products_in(tf32=True):
        assert (matmul.allow_tf32, matmul.allow_bf16_reduced_precision_reduction) == (True, False)
    assert (matmul.allow_tf32, matmul.allow_bf16_reduced_precision_reduction) == before


@pytest.fixture
def card(monkeypatch):
    """A pretended card: what is asked of torch.cuda, in order."""
    asked = []

    class Stream:
        def __init__(self, device=None):
            self.device = device

        def wait_stream(self, other):
            asked.append("wait")

    class Graph:
        def replay(self):
            asked.append("replay")

    class Context:
        def __init__(self, name):
            self.name = name

        def __enter__(self):
            asked.append(f"{self.name} begins")

        def __exit__(self, *error):
            asked.append(f"{self.name} ends")

    class Generator:
        def graphsafe_get_state(self):
            return "fresh"

        def graphsafe_set_state(self, state):
            asked.append(f"{state} generator")

    monkeypatch.setattr(torch, "Generator", lambda device: Generator())
    for name in ("_cuda_endAllocateToPool", "_cuda_releasePool"):
        fake = functools.partial(lambda name, index, pool: asked.append(f"{name} {index} {pool}"), name)
        monkeypatch.setattr(torch._C, name, fake, raising=False)
    memory = iter([100, 350])
    for name, fake in {
        "Stream": Stream,
        "CUDAGraph": Graph,
        "current_stream": Stream,
        "set_stream": lambda stream: asked.append(f"back to the stream of {stream.device}"),
        "current_device": lambda: 0,
        "default_generators": [Generator()],
        "stream": lambda stream: Context("stream"),
        "graph": lambda graph, pool: Context(pool),
        "graph_pool_handle": iter(("graph", "other graph")).__next__,
        "synchronize": lambda device: asked.append("synchronize"),
        "empty_cache": lambda: asked.append("empty_cache"),
        "reset_peak_memory_stats": lambda device: asked.append("reset"),
        "memory_allocated": lambda device: next(memory),
        "max_memory_allocated": lambda device: next(memory),
    }.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    return asked


def test_a_graph_is_captured_once_and_replayed(card):
    meter = Meter(torch.device("cuda"), HostStopwatch(), least=2, most=2)

    def bad():
        if card[-1] == "graph begins":
            raise RuntimeError("operation not permitted when stream is capturing")

    found = meter.graphs({"a": lambda: card.append("step"), "bad": bad, "c": lambda: None})
    assert found.samples.keys() == {"a", "c"} and "capturing" in found.errors["bad"]
    assert " ".join(card).startswith(
        "wait stream begins step step step stream ends wait graph begins step graph ends wait stream begins stream ends "
        "wait graph begins graph ends back to the stream of cuda _cuda_endAllocateToPool 0 graph _cuda_releasePool 0 graph "
        "fresh generator synchronize empty_cache wait stream begins stream ends wait other graph begins other graph ends replay"
    )
    assert card.count("step") == 4 and card.count("replay") == 8, "two of each are warm"


def test_a_card_that_no_longer_answers_is_lost(card, monkeypatch):
    def dead(device):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "synchronize", dead)
    meter = Meter(torch.device("cuda"), HostStopwatch())
    with pytest.raises(CardLost, match=r"bad: ZeroDivisionError.*; then RuntimeError: CUDA error") as lost:
        meter.measure({"good": lambda: None, "bad": lambda: 1 / 0})
    assert lost.value.arm == "bad"


def test_peak_memory_is_of_a_step_that_was_taken_before(card):
    meter = Meter(torch.device("cuda"), HostStopwatch())
    assert meter.peak_bytes(lambda: card.append("step")) == 250
    assert card == ["step", "synchronize", "reset", "step", "synchronize"]


def test_memory_is_not_counted_on_the_host(meter):
    assert meter.peak_bytes(lambda: None) is None
