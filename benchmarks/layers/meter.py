"""Three times of a layer: on the device, in eager wall time, replayed as a CUDA graph. And the memory it takes."""

from __future__ import annotations

import contextlib
import functools
import gc
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from benchmarks.layers.variants import Case
from loradash_kernels.timing import ArmError, HostStopwatch, Samples, Stopwatch, measure

# Steps back to back are timed for about so long: the host's hiccups are longer than a step.
_WALL_MILLISECONDS = 20.0
_MOST_STEPS = 20
_WARM_GRAPH = 3

Calls = Mapping[str, Callable[[], object]]


@dataclass
class Found:
    """Samples by arm, and for an arm that failed why."""

    samples: dict[str, Samples] = field(default_factory=dict)
    errors: dict[str, str] = field(default_factory=dict)

    @property
    def shortest(self) -> float:
        """Milliseconds of the fastest arm; 1 where there is none."""
        return min((samples.median for samples in self.samples.values()), default=1.0)


class CardLost(RuntimeError):
    """The card answers no more in this process; `arm` is what was running, `why` what it raised."""

    def __init__(self, arm: str, why: str) -> None:
        super().__init__(f"{arm}: {why}")
        self.arm, self.why = arm, why


def said(error: BaseException) -> str:
    """An error as a row has it: its class and the first lines of what it says."""
    if isinstance(error, ArmError) and error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"


@dataclass
class Meter:
    """How a device is measured. seconds: at most so long for each of the measurements."""

    device: torch.device
    stopwatch: Stopwatch
    seconds: float = 3.0
    least: int = 10
    most: int = 100

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def recover(self, arm: str, why: str) -> None:
        """After an arm's error: memory of what failed is given back. Raises CardLost where the card no longer answers."""
        gc.collect()
        if self.device.type == "cuda":
            try:
                torch.cuda.synchronize(self.device)
                torch.cuda.empty_cache()
            except RuntimeError as error:
                raise CardLost(arm, f"{why}; then {said(error)}") from error

    def measure(self, arms: Calls, before: Calls | None = None, stopwatch: Stopwatch | None = None) -> Found:
        """All arms in turn; one that fails is left out, and the others are measured anew."""
        arms, found = dict(arms), Found()
        while arms:
            try:
                found.samples = measure(
                    arms,
                    before=before,
                    stopwatch=stopwatch or self.stopwatch,
                    least=self.least,
                    most=self.most,
                    seconds=self.seconds,
                )
                break
            except ArmError as error:
                arm, words = error.arm, said(error)
                # The error holds what was allocated.
                del error
                found.errors[arm] = words
                del arms[arm]
                self.recover(arm, words)
        return found

    def passes(
        self, cases: Mapping[str, Case], takes: Callable[[str, str], bool] = lambda name, pass_: True
    ) -> dict[str, Found]:
        """Device time of forward, of backward and of both ("step"). takes: is an arm timed so? What no arm takes is left out."""
        methods = {
            "forward": (Case.forward, None),
            "backward": (Case.backward, Case.keep_forward),
            "step": (Case.step, None),
        }
        found = {}
        for pass_, (method, first) in methods.items():
            chosen = {name: case for name, case in cases.items() if takes(name, pass_)}
            if not chosen:
                continue
            found[pass_] = self.measure(
                {name: functools.partial(method, case) for name, case in chosen.items()},
                before=first and {name: functools.partial(first, case) for name, case in chosen.items()},
            )
        return found

    def wall(self, steps: Calls, milliseconds: float) -> Found:
        """Host and device: steps back to back. milliseconds: what one takes, about."""
        count = max(1, min(_MOST_STEPS, int(_WALL_MILLISECONDS / max(milliseconds, 1e-6))))

        def block(step: Callable[[], object]) -> Callable[[], object]:
            def call() -> None:
                for _ in range(count):
                    step()
                self.synchronize()

            return call

        found = self.measure({name: block(step) for name, step in steps.items()}, stopwatch=HostStopwatch())
        found.samples = {n: Samples([t / count for t in s.milliseconds]) for n, s in found.samples.items()}
        return found

    def graphs(self, steps: Calls) -> Found:
        """Device time of replays; every arm has an error where there are no CUDA graphs."""
        if self.device.type != "cuda":
            return Found(errors=dict.fromkeys(steps, "a CUDA graph needs a card"))
        # No graph leaves anything alive, so that they may share their memory: of large layers there would not be enough.
        graphs, errors, pool = {}, {}, torch.cuda.graph_pool_handle()
        for name, step in steps.items():
            try:
                graphs[name] = _captured(step, self.device, pool)
            except Exception as error:
                errors[name] = said(error)
                del error
                self.recover(name, errors[name])
                # The allocator takes no pool again that it was given back.
                pool = torch.cuda.graph_pool_handle()
        found = self.measure({name: graph.replay for name, graph in graphs.items()})
        found.errors |= errors
        return found

    def peak_bytes(self, step: Callable[[], object]) -> int | None:
        """What a step takes beyond what lives between steps; None where memory is not counted."""
        if self.device.type != "cuda":
            return None
        step()
        self.synchronize()
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        step()
        self.synchronize()
        return torch.cuda.max_memory_allocated(self.device) - before


def _captured(step: Callable[[], object], device: torch.device, pool: Any) -> Any:
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(_WARM_GRAPH):
            step()
    current = torch.cuda.current_stream(device)
    current.wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, pool=pool):
            step()
    except Exception:
        _abandon_capture(device, current, pool)
        raise
    return graph


def _abandon_capture(device: torch.device, stream: Any, pool: Any) -> None:
    """A capture that failed leaves its own stream current, the allocator and the generator waiting for the rest of it: nothing
    could be freed, and draws would raise."""
    index = torch.cuda.current_device() if device.index is None else device.index
    torch.cuda.set_stream(stream)
    # The name before PyTorch 2.8 is the other.
    end = getattr(torch._C, "_cuda_endAllocateToPool", None) or torch._C._cuda_endAllocateCurrentStreamToPool
    # It raises where the capture did end, and only the step in it had failed: then the graph gives back the pool.
    with contextlib.suppress(RuntimeError):
        end(index, pool)
        torch._C._cuda_releasePool(index, pool)
    fresh = torch.Generator(torch.device("cuda", index))
    torch.cuda.default_generators[index].graphsafe_set_state(fresh.graphsafe_get_state())


@contextlib.contextmanager
def products_in(tf32: bool) -> Iterator[None]:
    """With or without TF32 in the library's fp32 products, and sums of 16-bit products in fp32 throughout, as the error rule
    assumes."""
    matmul = torch.backends.cuda.matmul
    names = ("allow_tf32", "allow_bf16_reduced_precision_reduction", "allow_fp16_reduced_precision_reduction")
    before = {name: getattr(matmul, name) for name in names}
    try:
        for name, wanted in zip(names, (tf32, False, False), strict=True):
            setattr(matmul, name, wanted)
        yield
    finally:
        for name, value in before.items():
            setattr(matmul, name, value)
