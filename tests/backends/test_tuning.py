"""Tuning: the fastest is kept, on disk too, whatever state the disk is in."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import warnings

import pytest
import torch
from support.cards import OnCard, backward_call, forward_call
from support.stopwatch import Scripted

from loradash_kernels import notices, timing
from loradash_kernels.backends import tuning
from loradash_kernels.backends.measurements import from_json
from loradash_kernels.backends.tuning import MEASURED

NAMES = ("slow", "fast", "middling")
TIMES = {"slow": 3.0, "fast": 1.0, "middling": 2.0}


def chosen(call, owner="a backend", run=lambda name: None):
    return tuning.choose(owner, call, lambda: NAMES, run)


def measured(call, owner="a backend", **times):
    clock = Scripted(**{**TIMES, **times})
    return tuning.tune(tuning.key(owner, call), NAMES, clock.run, device="cpu", stopwatch=clock)


@pytest.fixture
def clocked(monkeypatch):
    """The clock of every tuning, by which the candidates take TIMES."""
    clock = Scripted(**TIMES)
    monkeypatch.setattr(timing, "stopwatch_for", lambda device: clock)
    return clock


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
    assert [f.name for f in cache.iterdir() if f.suffix != ".lock"] == ["measurements-2.json"]


def test_each_run_is_flushed_spun_and_stamped_and_candidates_are_interleaved(cache, call):
    """After one run of each, which compiles, nothing runs outside flush, spin, start, run, end; and the rounds of all
    candidates come in random orders."""
    clock = Scripted(**TIMES)
    tuning.tune(tuning.key("a backend", call), NAMES, clock.run, device="cpu", stopwatch=clock)
    assert tuple(clock.events[:3]) == NAMES
    timed = [clock.events[i : i + 5] for i in range(3, len(clock.events), 5)]
    assert all(t[:3] == ["flush", "spin", "stamp"] and t[4] == "stamp" for t in timed)
    ran = [t[3] for t in timed][2 * len(NAMES) :]
    rounds = [tuple(ran[i : i + 3]) for i in range(0, len(ran), 3)]
    assert len(rounds) >= 10 and all(sorted(r) == sorted(NAMES) for r in rounds) and len(set(rounds)) > 1


def test_a_record_tells_times_and_card(cache, call, monkeypatch):
    monkeypatch.setattr(timing, "card_facts", lambda device: {"driver": "580.65", "SM clock": "1410 MHz"})
    measured(call)
    (entry,) = json.loads(MEASURED.path().read_text())["measurements"]
    assert entry["fastest"] == "fast" and entry["details"]["milliseconds"] == TIMES
    assert entry["details"]["spread"] == dict.fromkeys(TIMES, 0.0) and entry["details"]["rounds"] == 10
    assert entry["details"]["facts"] == {"driver": "580.65", "SM clock": "1410 MHz"}


def test_what_does_not_fit_is_left_out(cache, call):
    assert measured(call, fast=RuntimeError("out of shared memory")) == "middling"


def test_nothing_fits(cache, call):
    none = {name: RuntimeError("no") for name in NAMES}
    with pytest.warns(
        UserWarning, match=r"tuning failed, the default holds for a backend/.*no candidate ran:\nslow: no"
    ):
        assert measured(call, **none) is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert measured(call, **none) is None  # said once
    assert chosen(call) is None and not cache.exists()


def test_a_failure_is_not_repeated(card, cache, monkeypatch, clocked):
    card(8, 6)
    monkeypatch.setenv("LORADASH_TUNE", "1")
    clocked.times = {name: RuntimeError("no") for name in NAMES}
    with pytest.warns(UserWarning, match="tuning failed"):
        assert chosen(forward_call(OnCard()), run=clocked.run) is None
    # What is learnt of another call makes this one's look-up begin anew.
    MEASURED.remember(tuning.key("another", forward_call(OnCard())), "fast")
    assert chosen(forward_call(OnCard()), run=clocked.run) is None
    assert clocked.events == list(NAMES)


def test_one_candidate_needs_no_clock(cache, call):
    clock = Scripted()
    assert tuning.tune(tuning.key("a", call), ["alone"], clock.run, stopwatch=clock) == "alone"
    assert MEASURED.known() == {} and clock.events == [], "nothing was measured: another candidate may come"


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"{",
        b"[]",
        b'{"measurements": {}}',
        b'{"measurements": [1]}',
        b'{"measurements": [{"fastest": "a"}]}',
        b'{"fastest": {}}',
        b"\x00\x01",
        b"\xff\xfe\x00",
    ],
)
def test_damaged_file(cache, call, text):
    cache.mkdir()
    MEASURED.path().write_bytes(text)
    with pytest.warns(UserWarning, match="damaged"):
        assert chosen(call) is None
    measured(call)
    MEASURED.forget()
    assert chosen(call) == "fast"


def test_a_shared_cache_is_for_all_its_readers(cache, call):
    measured(call)
    assert MEASURED.path().stat().st_mode & 0o777 == 0o644


def test_name_of_no_candidate(cache, call):
    MEASURED.remember(tuning.key("a backend", call), "magic")
    with pytest.warns(
        UserWarning, match="'magic', measured to be the fastest of a backend, is no candidate here"
    ) as said:
        assert [chosen(call), chosen(forward_call(torch.empty(9, 64)))] == [None, None]
    assert len(said) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        notices._given.clear()
        MEASURED.chosen.clear()
        assert tuning.choose("a backend", call, lambda: ["fused"], lambda name: None) is None, "there is no choice"


def test_file_that_cannot_be_written(cache, call):
    cache.write_text("a file where the folder should be")
    with pytest.warns(UserWarning, match="cannot be written"):
        measured(call)
    assert chosen(call) == "fast"


def numbered(index):
    return tuning.key(f"owner {index}", forward_call(torch.empty(100, 64)))


def _write(index):
    MEASURED.forget()
    MEASURED.remember(numbered(index), str(index))


def test_concurrent_processes(cache):
    """Eight processes write at once; nobody's entry is lost and the file is whole."""
    with multiprocessing.get_context("fork").Pool(8) as pool:
        pool.map(_write, range(8), chunksize=1)
    found = from_json(json.loads(MEASURED.path().read_text())["measurements"])
    assert found == {numbered(i): (str(i), {}) for i in range(8)}


def test_forced(cache, call):
    measured(call)
    with tuning.forced("a backend", forward="slow"):
        assert chosen(call) == "slow"
        assert chosen(call, "another") is None and chosen(backward_call(call.x)) is None
    assert chosen(call) == "fast"


def test_measures_where_it_is_asked_to_and_may(card, cache, monkeypatch, clocked):
    """On a card, once for each key, never while a graph is captured, and where LORADASH_TUNE=1 alone."""
    card(8, 6)
    on_card, on_cpu, empty = (forward_call(x) for x in (OnCard(), torch.empty(8, 16), OnCard(shape=(0, 16))))
    assert chosen(on_card, run=clocked.run) is None
    monkeypatch.setenv("LORADASH_TUNE", "1")
    with monkeypatch.context() as capture:
        capture.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        assert chosen(on_card, run=clocked.run) is None
    assert [chosen(c, run=clocked.run) for c in (on_cpu, empty)] == [None, None] and clocked.events == []
    assert chosen(on_card, run=clocked.run) == "fast"
    ran = len(clocked.events)
    assert chosen(on_card, run=clocked.run) == "fast" and len(clocked.events) == ran > 0


def test_measures_on_the_device_of_x(card, cache, monkeypatch, clocked):
    card(8, 6)
    entered = []
    monkeypatch.setattr(torch.cuda, "device", lambda d: (entered.append(d), contextlib.nullcontext())[1])
    monkeypatch.setenv("LORADASH_TUNE", "1")
    chosen(forward_call(OnCard()), run=clocked.run)
    assert entered == [OnCard.device]


def test_each_device_has_its_own(card, cache, monkeypatch):
    """Two cards in one machine: what holds for one says nothing of the other."""
    card(8, 6)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"card {device.index}")
    first, second = OnCard(), OnCard()
    second.device = torch.device("cuda", 1)
    MEASURED.remember(tuning.key("a backend", forward_call(first)), "fast")
    assert [chosen(forward_call(x)) for x in (first, second)] == ["fast", None]


def test_what_is_measured_later_holds_from_then_on(cache, call):
    """Also where the call was seen before, while another of its owner's was known."""
    MEASURED.remember(tuning.key("a backend", backward_call(call.x)), "slow")
    assert chosen(call) is None
    MEASURED.remember(tuning.key("a backend", call), "fast")
    assert chosen(call) == "fast"


def test_what_is_known_is_of_this_card_and_these_versions(card, cache):
    card(8, 6)
    name = tuning.key("a backend", forward_call(OnCard()))
    MEASURED.remember(name._replace(card="another card"), "fast")
    MEASURED.remember(name._replace(versions="older"), "fast")
    assert tuning.known_of("a backend", OnCard.device) is None
    MEASURED.remember(name, "fast")
    assert tuning.known_of("a backend", OnCard.device) == "measurements: 1 of this machine"


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
        key(weight=torch.empty(32, 66)[:, :64]),
        key(extra=("tf32",)),
    ]
    assert len({key(), *others}) == 1 + len(others)
    call = backward_call(torch.empty(100, 64))
    assert tuning.key("a backend", call) != tuning.key("a backend", call._replace(dx=None))
