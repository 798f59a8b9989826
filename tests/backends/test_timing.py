"""The shared timer: what is done around every call, in which order, and when it ends. Without a GPU, on a fake clock."""

from __future__ import annotations

import subprocess
import types

import pytest
import torch
from support.stopwatches import FakeStopwatch

from loradash_kernels import timing
from loradash_kernels.timing import ArmError, CudaStopwatch, HostStopwatch, Samples, card_facts, measure


def test_every_call_is_flushed_spun_and_stamped():
    bench = FakeStopwatch()
    found = measure({"a": bench.arm("a", 3.0), "b": bench.arm("b", 4.0)}, stopwatch=bench, warm=1, least=5, seed=3)
    calls = [bench.events[i : i + 5] for i in range(0, len(bench.events), 5)]
    assert all(call[:3] == ["flush", "spin", "stamp"] and call[4:] == ["stamp"] for call in calls)
    assert [call[3] for call in calls[:2]] == ["a", "b"], "warm calls come first"
    assert len(calls) == 2 + 2 * 5
    assert (found["a"].milliseconds, found["b"].milliseconds) == ([3.0] * 5, [4.0] * 5)


def test_what_comes_before_a_call_is_not_measured():
    bench = FakeStopwatch()
    found = measure(
        {"a": bench.arm("a", 2.0), "b": bench.arm("b", 1.0)},
        before={"a": bench.arm("forward", 50.0)},
        stopwatch=bench,
        warm=0,
        least=1,
        most=1,
    )
    assert "forward flush spin stamp a stamp" in " ".join(bench.events)
    assert bench.events.count("forward") == 1 and found["a"].milliseconds == [2.0]


def orders(seed, names="abcd", rounds=8):
    bench = FakeStopwatch()
    measure({n: bench.arm(n, 1.0) for n in names}, stopwatch=bench, warm=0, least=rounds, most=rounds, seed=seed)
    called = "".join(event for event in bench.events if event in names)
    return [called[i : i + len(names)] for i in range(0, len(called), len(names))]


def test_each_round_has_every_arm_once_in_a_random_order():
    assert all(sorted(order) == list("abcd") for order in orders(0))
    assert len(set(orders(0))) > 1
    assert orders(0) == orders(0) != orders(1)


def test_rounds_go_on_until_the_spread_is_below_the_bound():
    bench = FakeStopwatch()
    # Four wild calls, then quiet ones: with sixteen quiet beside them the quartiles are quiet too.
    takes = [5.0, 9.0, 6.0, 8.0, *[1.0] * 1000]
    found = measure({"a": bench.arm("a", *takes)}, stopwatch=bench, warm=0, least=3)["a"]
    assert 3 < len(found.milliseconds) < 200
    assert found.spread < 0.02 and Samples(found.milliseconds[:-1]).spread >= 0.02
    assert found.median == 1.0


def test_one_unsteady_arm_keeps_all_going_to_the_most():
    bench = FakeStopwatch()
    arms = {"quiet": bench.arm("quiet", 1.0), "wild": bench.arm("wild", 1.0, 2.0)}
    found = measure(arms, stopwatch=bench, warm=0, most=25)
    assert [len(samples.milliseconds) for samples in found.values()] == [25, 25]


def test_seconds_end_it_even_before_the_least(monkeypatch):
    bench = FakeStopwatch()
    monkeypatch.setattr(timing, "perf_counter", lambda: 1e-3 * bench.now)
    found = measure({"a": bench.arm("a", 400.0, 600.0)}, stopwatch=bench, warm=0, seconds=2.0)["a"]
    assert found.milliseconds == [400.0, 600.0, 400.0, 600.0]


def test_one_round_is_taken_whatever_the_time():
    bench = FakeStopwatch()
    assert len(measure({"a": bench.arm("a", 1.0)}, stopwatch=bench, warm=0, seconds=0.0)["a"].milliseconds) == 1


@pytest.mark.parametrize("warm", [0, 2])
def test_an_arm_that_raises_is_named(warm):
    def broken():
        raise ValueError("no such tile")

    bench = FakeStopwatch()
    with pytest.raises(ArmError, match="arm 'bad' failed: ValueError: no such tile") as error:
        measure({"good": bench.arm("good", 1.0), "bad": broken}, stopwatch=bench, warm=warm)
    assert error.value.arm == "bad" and isinstance(error.value.__cause__, ValueError)


def test_what_shows_only_when_the_host_waits_is_named_too():
    class Late(FakeStopwatch):
        def elapsed(self, start, end):
            raise RuntimeError("an illegal memory access")

    bench = Late()
    with pytest.raises(ArmError, match="arm 'a' failed: RuntimeError: an illegal memory access"):
        measure({"a": bench.arm("a", 1.0)}, stopwatch=bench)


@pytest.mark.parametrize(("least", "most"), [(0, 5), (6, 5)])
def test_bounds_that_no_round_meets(least, most):
    with pytest.raises(ValueError, match="1 <= least <= most"):
        measure({}, least=least, most=most)


def test_samples():
    assert Samples([1.0, 2.0, 3.0, 4.0, 100.0]).median == 3.0
    assert Samples([1.0, 2.0, 3.0, 4.0, 5.0]).spread == pytest.approx(2 / 3)
    assert Samples([1.0]).spread == float("inf")


def test_the_host_is_timed_in_milliseconds(monkeypatch):
    monkeypatch.setattr(timing, "perf_counter", iter([1.0, 1.25]).__next__)
    watch = HostStopwatch()
    assert watch.elapsed(watch.stamp(), watch.stamp()) == 250.0


class FakeEvent:
    passed = False

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self, stream):
        assert stream == "stream"

    def query(self):
        return self.passed


@pytest.fixture
def slept(monkeypatch):
    """The cycles of every spin, on a pretended card."""
    found = []
    monkeypatch.setattr(timing.torch, "empty", lambda *args, **kwargs: types.SimpleNamespace(zero_=lambda: None))
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "device", lambda device: timing.contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: "stream")
    monkeypatch.setattr(torch.cuda, "_sleep", found.append, raising=False)
    return found


def test_a_host_that_comes_late_lengthens_the_spin(slept, monkeypatch):
    watch = CudaStopwatch("cuda")

    def once(late):
        monkeypatch.setattr(FakeEvent, "passed", late)
        watch.flush()
        watch.spin()
        watch.stamp()
        watch.stamp()

    for late in (False, True, True, *[True] * 9):
        once(late)
    first = slept[0]
    assert slept[:4] == [first, first, 2 * first, 4 * first]
    assert max(slept) == timing._LONGEST_SPIN and watch.late == 11


def test_calls_in_time_shorten_the_spin_again(slept, monkeypatch):
    watch = CudaStopwatch("cuda")

    def once(late):
        monkeypatch.setattr(FakeEvent, "passed", late)
        watch.spin()
        watch.stamp()
        watch.stamp()

    for late in (True, *[False] * 200):
        once(late)
    assert slept[1] == 2 * slept[0] > slept[2] > slept[50]
    assert slept[-1] == min(slept) == timing._SPIN_CYCLES and watch.late == 1


def test_the_card_that_is_timed_spins(slept, monkeypatch):
    """The spin is the current device's, whichever that is."""
    entered = []
    monkeypatch.setattr(torch.cuda, "device", lambda device: entered.append(device) or timing.contextlib.nullcontext())
    CudaStopwatch("cuda:1").spin()
    assert entered == [torch.device("cuda", 1)] and len(slept) == 1


def test_a_stamp_without_a_spin_judges_nothing(slept, monkeypatch):
    monkeypatch.setattr(FakeEvent, "passed", True)
    watch = CudaStopwatch("cuda")
    watch.stamp()
    watch.stamp()
    assert watch.late == 0


HEADER = (
    "name, driver_version, clocks.current.sm [MHz], clocks.max.sm [MHz], clocks.current.memory [MHz], clocks.max.memory [MHz], "
    "power.draw [W], power.limit [W], temperature.gpu, clocks_event_reasons.active\n"
)
A100 = HEADER + "NVIDIA A100-SXM4-40GB, 580.65.06, 1410 MHz, 1410 MHz, 1215 MHz, 1215 MHz, 389.10 W, 400.00 W, 61, {}\n"


@pytest.fixture
def smi(monkeypatch):
    """A card, and an nvidia-smi that is told what to answer to each question in turn."""
    answers, asked = [], []

    def run(command, **options):
        asked.append(command)
        assert options["timeout"] and options["check"]
        answer = answers.pop(0)
        if isinstance(answer, BaseException):
            raise answer
        return types.SimpleNamespace(stdout=answer)

    card = types.SimpleNamespace(name="NVIDIA A100-SXM4-40GB", major=8, minor=0, uuid="1234")
    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    monkeypatch.setattr(torch._C, "_cuda_getDriverVersion", lambda: 13000, raising=False)
    return types.SimpleNamespace(answers=answers, asked=asked)


def test_facts_of_a_card(smi):
    smi.answers.append(A100.format("0x0000000000000024"))
    facts = card_facts("cuda:0")
    assert facts == {
        "card": "NVIDIA A100-SXM4-40GB",
        "capability": "8.0",
        "driver": "580.65.06",
        "driver's CUDA": "13.0",
        "SM clock": "1410 MHz",
        "SM clock limit": "1410 MHz",
        "memory clock": "1215 MHz",
        "memory clock limit": "1215 MHz",
        "power": "389.10 W",
        "power limit": "400.00 W",
        "temperature": "61",
        "throttled": "power cap, software thermal",
    }
    assert smi.asked[0][:2] == ["nvidia-smi", "--id=GPU-1234"]


@pytest.mark.parametrize(
    ("reasons", "words"), [("0x0000000000000000", "no"), ("0x0000000000000001", "idle"), ("[N/A]", "unknown")]
)
def test_reasons_to_throttle_are_words(smi, reasons, words):
    smi.answers.append(A100.format(reasons))
    assert card_facts("cuda:0")["throttled"] == words


def test_an_older_driver_has_another_name_for_them(smi):
    smi.answers += [subprocess.CalledProcessError(2, "nvidia-smi"), A100.format("0x0000000000000000")]
    assert card_facts("cuda:0")["throttled"] == "no"
    assert [command[2].split(",")[-1] for command in smi.asked] == [*timing._THROTTLE_FIELDS]


def test_what_a_card_does_not_tell_is_unknown(smi):
    smi.answers.append(A100.format("0x0").replace("389.10 W", "[Not Supported]").replace("400.00 W", "[N/A]"))
    facts = card_facts("cuda:0")
    assert (facts["power"], facts["power limit"], facts["driver"]) == ("unknown", "unknown", "580.65.06")


@pytest.mark.parametrize(
    "answer",
    [FileNotFoundError("nvidia-smi"), subprocess.TimeoutExpired("nvidia-smi", 10), "nonsense", HEADER + "a, b"],
)
def test_without_an_answer_only_torch_is_known(smi, answer):
    smi.answers += [answer, answer]
    facts = card_facts("cuda:0")
    assert (facts["card"], facts["capability"], facts["driver's CUDA"]) == ("NVIDIA A100-SXM4-40GB", "8.0", "13.0")
    assert {facts["driver"], facts["power"], facts["throttled"]} == {"unknown"}


def test_another_card_of_that_number_is_not_asked(smi, monkeypatch):
    """Without a UUID, as on old ROCm: the numbers of nvidia-smi are not those of this process."""
    card = types.SimpleNamespace(name="a card", major=8, minor=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    assert card_facts("cuda:0")["driver"] == "unknown" and smi.asked == []


def test_a_cpu_has_the_same_keys(smi):
    smi.answers.append(A100.format("0x0"))
    assert card_facts("cpu").keys() == card_facts("cuda:0").keys()
    assert card_facts("cpu")["card"] == "none, cpu"


def test_only_gpus_and_cpus_have_a_stopwatch():
    assert isinstance(timing.stopwatch_for("cpu"), HostStopwatch)
    with pytest.raises(ValueError, match="cuda or cpu, got meta"):
        timing.stopwatch_for("meta")
