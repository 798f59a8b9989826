"""How long calls take, fairly: on a GPU by events, with a cold cache, the device kept busy while the host enqueues.

Importing this needs no CUDA.
"""

from __future__ import annotations

import contextlib
import random
import statistics
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any, Protocol

import torch

# No card's L2 cache holds so many bytes: 126 MB is the largest known.
_FLUSHED_BYTES = 1 << 28
# About a millisecond at the clocks of these cards; eager steps of ten to thirty launches are enqueued within it.
_SPIN_CYCLES = 2_000_000
_LONGEST_SPIN = 32 * _SPIN_CYCLES
_SMI_SECONDS = 10.0


class Stopwatch(Protocol):
    """What `measure` asks of a clock."""

    def flush(self) -> None:
        """Overwrites the device's L2 cache, so that operands come from memory, as in a model."""

    def spin(self) -> None:
        """Keeps the device busy while the host enqueues what follows: its launching is not measured."""

    def stamp(self) -> Any:
        """Marks this moment of the device's work."""

    def elapsed(self, start: Any, end: Any, /) -> float:
        """Milliseconds between two stamps; waits for the second."""


class CudaStopwatch:
    """Events on the current stream of a GPU.

    A host that is still enqueuing when the spin ends would be measured itself. `stamp` notices that the stamp before it had
    been passed already, counts it in `late` and doubles the spin for the calls to come, up to about 30 ms. Calls in time
    shorten it again, slowly: a host that was away once must not make every later call long.
    """

    def __init__(self, device: torch.device | str = "cuda") -> None:
        self.device = torch.device(device)
        self.late = 0
        self._cycles = _SPIN_CYCLES
        self._started: torch.cuda.Event | None = None
        self._spun = False
        self._flushed = torch.empty(_FLUSHED_BYTES, dtype=torch.int8, device=self.device)

    def flush(self) -> None:
        self._flushed.zero_()

    def spin(self) -> None:
        with torch.cuda.device(self.device):
            torch.cuda._sleep(self._cycles)
        self._spun = True

    def stamp(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        if self._started is not None:
            if self._started.query():
                self.late += 1
                self._cycles = min(2 * self._cycles, _LONGEST_SPIN)
            else:
                self._cycles = max(self._cycles - self._cycles // 128, _SPIN_CYCLES)
        # Only a stamp right after a spin is one that the device may not have passed yet.
        self._started, self._spun = (event if self._spun else None), False
        return event

    def elapsed(self, start: torch.cuda.Event, end: torch.cuda.Event) -> float:
        end.synchronize()
        return start.elapsed_time(end)


class HostStopwatch:
    """The host's clock, for the CPU: nothing is flushed and nothing spins."""

    def flush(self) -> None:
        pass

    def spin(self) -> None:
        pass

    def stamp(self) -> float:
        return perf_counter()

    def elapsed(self, start: float, end: float) -> float:
        return 1e3 * (end - start)


def stopwatch_for(device: torch.device | str) -> Stopwatch:
    """The stopwatch that times work on this device."""
    device = torch.device(device)
    if device.type == "cuda":
        return CudaStopwatch(device)
    if device.type == "cpu":
        return HostStopwatch()
    raise ValueError(f"device must be of type cuda or cpu, got {device}")


@dataclass
class Samples:
    """The times of one arm, in milliseconds, in the order in which they were taken."""

    milliseconds: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        return statistics.median(self.milliseconds)

    @property
    def spread(self) -> float:
        """The interquartile range over the median; infinite where there are fewer than two samples."""
        if len(self.milliseconds) < 2:
            return float("inf")
        first, _, third = statistics.quantiles(self.milliseconds, n=4, method="inclusive")
        return (third - first) / self.median if self.median > 0 else 0.0


class ArmError(RuntimeError):
    """An arm raised; `arm` is its name, the cause what it raised."""

    def __init__(self, arm: str, cause: BaseException) -> None:
        super().__init__(f"arm {arm!r} failed: {type(cause).__name__}: {cause}")
        self.arm = arm


def measure(
    arms: Mapping[str, Callable[[], object]],
    *,
    before: Mapping[str, Callable[[], object]] | None = None,
    stopwatch: Stopwatch | None = None,
    warm: int = 2,
    least: int = 10,
    most: int = 200,
    spread: float = 0.02,
    seconds: float | None = None,
    seed: int = 0,
) -> dict[str, Samples]:
    """Milliseconds of every arm, taken in rounds of all arms, each round in another random order.

    before: what an arm needs done before each of its calls, not measured: forward, where backward is timed.
    stopwatch: that of the GPU, where PyTorch sees one, else the host's. warm: calls of each arm that do not count.
    least, most: rounds. From `least` on, rounds end when the spread of every arm is below `spread`. seconds: of wall time,
    after which no further round begins, be they fewer than `least`. seed: of the orders. Raises ArmError where an arm
    raises, and ValueError for bounds that no round meets.
    """
    if not 1 <= least <= most:
        raise ValueError(f"least and most must be 1 <= least <= most, got {least} and {most}")
    stopwatch = stopwatch or stopwatch_for("cuda" if torch.cuda.is_available() else "cpu")
    found = {name: Samples() for name in arms}
    before = before or {}
    begun, order, names = perf_counter(), random.Random(seed), list(arms)
    for name in names:
        for _ in range(warm):
            _time(name, arms[name], before.get(name), stopwatch)
    for done in range(1, most + 1):
        order.shuffle(names)
        for name in names:
            found[name].milliseconds.append(_time(name, arms[name], before.get(name), stopwatch))
        settled = done >= least and all(samples.spread < spread for samples in found.values())
        if settled or (seconds is not None and perf_counter() - begun >= seconds):
            break
    return found


def _time(name: str, arm: Callable[[], object], before: Callable[[], object] | None, stopwatch: Stopwatch) -> float:
    try:
        if before is not None:
            before()
        stopwatch.flush()
        stopwatch.spin()
        start = stopwatch.stamp()
        arm()
        return stopwatch.elapsed(start, stopwatch.stamp())
    except Exception as error:
        # What a kernel does wrong may show only when the host waits for it.
        raise ArmError(name, error) from error


UNKNOWN = "unknown"
# What nvidia-smi is asked, and what it is called here. The last is named otherwise by older drivers.
_SMI_FIELDS = {
    "name": "card",
    "driver_version": "driver",
    "clocks.sm": "SM clock",
    "clocks.max.sm": "SM clock limit",
    "clocks.mem": "memory clock",
    "clocks.max.mem": "memory clock limit",
    "power.draw": "power",
    "power.limit": "power limit",
    "temperature.gpu": "temperature",
}
_THROTTLE_FIELDS = ("clocks_event_reasons.active", "clocks_throttle_reasons.active")
# Bits of NVML's nvmlClocksEventReasons.
_THROTTLE_BITS = {
    0x1: "idle",
    0x2: "application clocks",
    0x4: "power cap",
    0x8: "hardware slowdown",
    0x10: "sync boost",
    0x20: "software thermal",
    0x40: "hardware thermal",
    0x80: "power brake",
    0x100: "display clocks",
}


def card_facts(device: torch.device | str) -> dict[str, str]:
    """What a time depends on beside the code: card, capability, driver, clocks, power, temperature, reasons to throttle.

    The same keys on every machine; what cannot be had is "unknown", as all of it is for a CPU.
    """
    device = torch.device(device)
    facts = dict.fromkeys(
        ("card", "capability", "driver", "driver's CUDA", *_SMI_FIELDS.values(), "throttled"), UNKNOWN
    )
    if device.type != "cuda":
        return {**facts, "card": f"none, {device.type}"}
    properties = torch.cuda.get_device_properties(device)
    facts |= {"card": properties.name, "capability": f"{properties.major}.{properties.minor}"}
    facts["driver's CUDA"] = _driver_cuda()
    # By UUID alone: nvidia-smi numbers cards otherwise than a process to which CUDA_VISIBLE_DEVICES shows some of them.
    uuid = getattr(properties, "uuid", None)
    return facts if uuid is None else {**facts, **_smi(f"GPU-{uuid}")}


def _driver_cuda() -> str:
    """The newest CUDA that the driver runs, "13.0"."""
    ask = getattr(torch._C, "_cuda_getDriverVersion", None)
    found = ask() if ask else 0
    return f"{found // 1000}.{found % 1000 // 10}" if found else UNKNOWN


def _smi(which: str) -> dict[str, str]:
    """What nvidia-smi says of one card; nothing where it is not there, does not answer or does not know the fields."""
    for throttle in _THROTTLE_FIELDS:
        command = ["nvidia-smi", f"--id={which}", f"--query-gpu={','.join([*_SMI_FIELDS, throttle])}", "--format=csv"]
        with contextlib.suppress(OSError, subprocess.SubprocessError, ValueError):
            answer = subprocess.run(command, capture_output=True, text=True, timeout=_SMI_SECONDS, check=True)
            return _read_smi(answer.stdout)
    return {}


def _read_smi(text: str) -> dict[str, str]:
    """A header and one line, "NVIDIA A100-SXM4-40GB, 580.65, 1410 MHz, ...". ValueError for anything else."""
    _, line = text.strip().splitlines()
    *values, reasons = (value.strip() for value in line.split(","))
    facts = dict(zip(_SMI_FIELDS.values(), values, strict=True))
    facts["throttled"] = _reasons(reasons)
    return {name: UNKNOWN if value.startswith("[") or value == "N/A" else value for name, value in facts.items()}


def _reasons(text: str) -> str:
    """In words what "0x0000000000000004" stands for."""
    try:
        bits = int(text, 16)
    except ValueError:
        return UNKNOWN
    return ", ".join(word for bit, word in _THROTTLE_BITS.items() if bits & bit) or "no"
