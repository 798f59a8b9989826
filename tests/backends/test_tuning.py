"""Measurements: the fastest is kept, on disk too, whatever state the disk is in."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import warnings

import pytest
import torch
from support.cards import OnCard, backward_call, forward_call

from loradash_kernels.backends import tuning
from loradash_kernels.backends.tuning import MEASURED

NAMES = ("slow", "fast", "middling")


def scripted(times):
    """A timer that gives the next of these times, or raises it."""
    queue = iter(times)

    def timer(step):
        value = next(queue)
        if isinstance(value, Exception):
            raise value
        return value

    return timer


def chosen(call, owner="a backend", run=lambda name: None):
    return tuning.choose(owner, call, lambda: NAMES, run)


def measured(call, times=(3.0, 1.0, 2.0), owner="a backend"):
    return tuning.tune(tuning.key(owner, call), NAMES, lambda name: None, scripted(times))


@pytest.fixture
def call():
    return forward_call(torch.empty(100, 64))


def test_keeps_the_fastest(cache, call):
    assert chosen(call) is None
    assert measured(call) == "fast" == chosen(call)
    MEASURED.forget()
    # The answer comes from disk.
    assert chosen(call) == "fast"
    assert chosen(call, "another") is None
    assert chosen(backward_call(call.x)) is None
    # M = 128 lies in the same bucket.
    assert chosen(forward_call(torch.empty(128, 64))) == "fast"
    assert [f.name for f in cache.iterdir() if f.suffix != ".lock"] == ["measurements-1.json"]


def test_what_does_not_fit_is_left_out(cache, call):
    assert measured(call, [3.0, RuntimeError("out of shared memory"), 2.0]) == "middling"


def test_nothing_fits(cache, call):
    with pytest.warns(
        UserWarning, match=r"tuning failed, the table decides for a backend/.*no candidate ran:\nslow: no"
    ):
        assert measured(call, [RuntimeError("no")] * 3) is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert measured(call, [RuntimeError("no")] * 3) is None  # said once
    assert chosen(call) is None and not cache.exists()


def test_a_failure_is_not_repeated(card, cache, monkeypatch):
    card(8, 6)
    monkeypatch.setenv("LORADASH_TUNE", "1")
    monkeypatch.setattr(tuning, "milliseconds", scripted([RuntimeError("no")] * 3))
    with pytest.warns(UserWarning, match="tuning failed"):
        assert chosen(forward_call(OnCard())) is None
    # What is learnt of another call makes this one's look-up begin anew.
    MEASURED.remember("another key", "fast")
    assert chosen(forward_call(OnCard())) is None


def test_one_candidate_needs_no_clock(cache, call):
    assert tuning.tune("a key", ["alone"], lambda name: None, scripted([])) == "alone"
    assert MEASURED.known() == {}, "nothing was measured: another candidate may come"


@pytest.mark.parametrize(
    "text",
    [b"", b"{", b"[]", b'{"fastest": {"a": {"kind": "fused"}}}', b'{"fastest": []}', b"\x00\x01", b"\xff\xfe\x00"],
)
def test_damaged_file(cache, call, text):
    cache.mkdir()
    MEASURED.path().write_bytes(text)
    with pytest.warns(UserWarning, match="damaged"):
        assert chosen(call) is None
    measured(call)
    MEASURED.forget()
    assert chosen(call) == "fast"


def test_name_of_no_candidate(cache, call):
    MEASURED.remember(tuning.key("a backend", call), "magic")
    assert chosen(call) is None


def test_file_that_cannot_be_written(cache, call):
    cache.write_text("a file where the folder should be")
    with pytest.warns(UserWarning, match="cannot be written"):
        measured(call)
    assert chosen(call) == "fast"


def _write(index):
    MEASURED.forget()
    MEASURED.remember(f"key {index}", str(index))


def test_concurrent_processes(cache):
    """Eight processes write at once; nobody's entry is lost and the file is whole."""
    with multiprocessing.get_context("fork").Pool(8) as pool:
        pool.map(_write, range(8), chunksize=1)
    assert json.loads(MEASURED.path().read_text()) == {"fastest": {f"key {i}": str(i) for i in range(8)}}


def test_forced(cache, call):
    measured(call)
    with tuning.forced("a backend", forward="slow"):
        assert chosen(call) == "slow"
        assert chosen(call, "another") is None and chosen(backward_call(call.x)) is None
    assert chosen(call) == "fast"


def test_measures_where_it_is_asked_to_and_may(card, cache, monkeypatch):
    """On a card, once for each key, never while a graph is captured, and where LORADASH_TUNE=1 alone."""
    card(8, 6)
    times, ran = dict(zip(NAMES, (3.0, 1.0, 2.0), strict=True)), []
    monkeypatch.setattr(tuning, "milliseconds", lambda run: (run(), times[ran[-1]])[1])
    on_card, on_cpu, empty = (forward_call(x) for x in (OnCard(), torch.empty(8, 16), OnCard(shape=(0, 16))))
    assert chosen(on_card, run=ran.append) is None
    monkeypatch.setenv("LORADASH_TUNE", "1")
    with monkeypatch.context() as capture:
        capture.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        assert chosen(on_card, run=ran.append) is None
    assert [chosen(c, run=ran.append) for c in (on_cpu, empty)] == [None, None] and ran == []
    assert [chosen(on_card, run=ran.append) for _ in range(2)] == ["fast"] * 2 and ran == list(NAMES)


def test_measures_on_the_device_of_x(card, cache, monkeypatch):
    card(8, 6)
    entered = []
    monkeypatch.setattr(torch.cuda, "device", lambda d: (entered.append(d), contextlib.nullcontext())[1])
    monkeypatch.setattr(tuning, "milliseconds", lambda run: 1.0)
    monkeypatch.setenv("LORADASH_TUNE", "1")
    chosen(forward_call(OnCard()))
    assert entered == [OnCard.device]


def test_key_tells_what_matters():
    def key(owner="a backend", m=100, k=64, dtype=torch.float32, columns=False, extra=(), **fields):
        call = forward_call(torch.empty(m, k, dtype=dtype))
        if columns:
            call = call._replace(weight=torch.empty(k, 32).t())
        return tuning.key(owner, call._replace(**fields), *extra)

    assert key() == key(m=128)
    others = [
        key(owner="b"),
        tuning.key("a backend", backward_call(torch.empty(100, 64))),
        key(dtype=torch.float16),
        key(columns=True),
        key(m=129),
        key(k=72),
        key(weight=None),
        key(bias=torch.empty(32)),
        key(seed=torch.zeros(2, dtype=torch.int64)),
        key(lora_b=torch.empty(32, 8)),
        key(x=torch.empty(100 * 64 + 1)[1:].view(100, 64)),
        key(extra=("tf32",)),
    ]
    assert len({key(), *others}) == 1 + len(others)
    call = backward_call(torch.empty(100, 64))
    assert tuning.key("a backend", call) != tuning.key("a backend", call._replace(dx=torch.empty(100, 64)))
