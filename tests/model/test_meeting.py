"""Processes that wait for each other for longer than a collective may take."""

from __future__ import annotations

import pytest
import torch
from loradash import meeting
from loradash.meeting import Meeting
from support.processes import run_processes

# Long enough for the collectives of two processes on a busy machine.
SECONDS = 8.0

WORKER = f"""
import datetime, os, sys, time, torch
from torch import nn
import torch.distributed as dist
import loradash
module = sys.modules["loradash.prelaunch"]
rank, store, mode = int(sys.argv[1]), sys.argv[2], sys.argv[3]
timeout = datetime.timedelta(seconds={SECONDS})
dist.init_process_group("gloo", init_method=f"file://{{store}}", rank=rank, world_size=2, timeout=timeout)
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(48, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 8))
loradash.apply_dash(model, loradash.DashConfig(r=2, directions=3))
with torch.no_grad():
    for layer in loradash.dash_layers(model).values():
        layer.lora_b.normal_()
if mode == "sharded":
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
real = module.task_specific_directions
slept = []
def slow(*args, **options):
    if rank == 1 and not slept:
        slept.append(time.sleep(1.5 * {SECONDS}))
        if mode == "fails":
            raise ValueError("the disk is on fire")
    return real(*args, **options)
module.task_specific_directions = slow
try:
    if mode == "collective":
        if rank == 1:
            time.sleep(1.5 * {SECONDS})
        dist.all_gather_object([None, None], None)
    else:
        loradash.prelaunch(model, progress=False)
except (RuntimeError, ValueError) as error:
    print(type(error).__name__, error)
else:
    print(sum(bool(layer.launched) for layer in loradash.dash_layers(model).values()))
sys.stdout.flush()
os._exit(0)
"""


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["plain", "sharded", "fails", "collective"])
def test_one_process_takes_longer_than_the_timeout(tmp_path, mode):
    """Both launch, or both raise; a process that waited in a collective would not have got through."""
    waiting, slow = run_processes(WORKER, tmp_path, mode)
    if mode == "collective":
        assert "RuntimeError" in waiting
    elif mode == "fails":
        assert "process 1" in waiting and "on fire" in waiting and "on fire" in slow
    else:
        assert waiting.strip() == slow.strip() == "3"


class Others:
    """A store in which the other processes of a meeting have written something already."""

    def __init__(self):
        self.values = {}

    def set(self, key, value):
        self.values[key] = value.encode()

    def get(self, key):
        return self.values[key]

    def add(self, key, amount):
        self.values[key] = int(self.values.get(key, 0)) + amount
        return self.values[key]

    def check(self, keys):
        return all(key in self.values for key in keys)


@pytest.fixture
def store(monkeypatch):
    store = Others()
    monkeypatch.setattr(meeting, "_store", lambda: store)
    monkeypatch.setattr(torch.distributed, "broadcast_object_list", lambda names, src, group: None)
    monkeypatch.setattr(meeting, "LAST_PAUSE", 0.002)
    return store


def test_processes_that_are_not_heard_of(store, monkeypatch):
    """Nobody waits for the dead for ever, and the message names them."""
    monkeypatch.setattr(meeting, "SILENCE", 0.05)
    here = Meeting(0, 3, "the job")
    (prefix,) = [here._prefix]
    store.set(f"{prefix}/1/1", ":")
    store.add(f"{prefix}/1/came", 1)
    with pytest.raises(RuntimeError, match=r"the job: nothing was heard .* of the processes 2; the model is unchanged"):
        here.meet()


class Shown:
    """A bar that remembers what it showed."""

    def __init__(self):
        self.n, self.steps = 0, []

    def update(self, steps):
        self.n += steps
        self.steps.append(self.n)


def test_progress_of_all_is_shown_while_one_waits(store, monkeypatch):
    bar = Shown()
    here = Meeting(0, 2, "the job", bar)
    here.advance(2)

    def others_work(_seconds):
        if store.add(f"{here._prefix}/steps", 1) == 5:
            store.add(f"{here._prefix}/1/came", 1)
            store.set(f"{here._prefix}/1/1", ":")
            store.set(f"{here._prefix}/1/all", "yes")

    monkeypatch.setattr("time.sleep", others_work)
    here.meet()
    assert bar.steps == [2, 2, 3, 4, 5]


def test_a_failure_is_known_before_the_meeting(store):
    here = Meeting(0, 2, "the job")
    assert not here.is_lost()
    store.set(f"{here._prefix}/failed", "yes")
    assert here.is_lost()


def test_a_failure_is_told_to_the_others(store):
    """Those that are still at work see it, and what they read at the meeting is what went wrong."""
    here = Meeting(1, 2, "the job")
    store.set(f"{here._prefix}/1/all", "yes")
    with pytest.raises(KeyError, match="mine"):
        here.meet(KeyError("mine"))
    assert here.is_lost() and store.get(f"{here._prefix}/1/1") == b":KeyError: 'mine'"


def come(store, here, process, text, place=1):
    """Another process comes to the meeting."""
    store.set(f"{here._prefix}/{place}/{process}", f":{text}")
    if text:
        store.set(f"{here._prefix}/failed", "yes")
    store.add(f"{here._prefix}/{place}/came", 1)


def test_the_first_process_leaves_last(store, monkeypatch):
    """Its end is that of the store, from which the others still read what failed."""
    here, pauses = Meeting(0, 3, "the job"), []
    come(store, here, 1, "ValueError: x")
    come(store, here, 2, "")

    def others_read(_seconds):
        pauses.append(store.add(f"{here._prefix}/1/read", 1))

    monkeypatch.setattr("time.sleep", others_read)
    with pytest.raises(RuntimeError, match="the job failed in process 1, the model is unchanged: ValueError: x"):
        here.meet()
    assert pauses == [2, 3]


def test_the_first_process_does_not_stay_for_ever(store, monkeypatch):
    monkeypatch.setattr(meeting, "FAREWELL", 0.05)
    here = Meeting(0, 2, "the job")
    come(store, here, 1, "")
    with pytest.raises(KeyError, match="mine"):
        here.meet(KeyError("mine"))


def test_an_own_error_is_raised_without_the_store(store, monkeypatch):
    """Another process ended first, and the store with it."""
    here = Meeting(1, 2, "the job")

    def gone(keys):
        raise torch.distributed.DistNetworkError("Connection was likely closed")

    monkeypatch.setattr(store, "check", gone)
    with pytest.raises(KeyError, match="mine"):
        here.meet(KeyError("mine"))
    with pytest.raises(torch.distributed.DistNetworkError):
        here.meet()


def test_one_process_alone_stores_nothing(monkeypatch):
    monkeypatch.setattr(meeting, "_store", None)
    bar = Shown()
    alone = Meeting(0, 1, "the job", bar)
    alone.advance(3)
    alone.meet()
    assert bar.steps == [3] and not alone.is_lost()
    with pytest.raises(KeyError):
        alone.meet(KeyError())
