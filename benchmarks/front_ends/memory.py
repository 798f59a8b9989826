"""What a training step takes of memory, every arm in a process of its own.

    python -m benchmarks.front_ends.memory ARM HIDDEN INNER LAYERS BATCH TOKENS DTYPE     prints one line of JSON

PyTorch's allocator for the CPU keeps no peak, so it is asked in three ways:

    peak bytes      the largest sum of what the allocator handed out during a step, beyond what was there at its start (weights,
                    adapters, the optimizer's state): activations, gradients and whatever operators take in between, as the
                    profiler notes every allocation
    saved bytes     what autograd keeps from forward to backward, each storage once, without parameters and buffers
    resident bytes  the most that the process held of the machine's memory, Python and libraries included, weights and all
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import astuple
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.profiler import ProfilerActivity, profile
from transformers import TrainerCallback

from .arms import ARMS, Arm, build, callbacks_of
from .models import Sizes
from .training import make_trainer

ROOT = Path(__file__).parents[2]
MEASURES = ("peak bytes", "saved bytes", "resident bytes")
# The optimizer's state is there after the first step.
_PLAIN, _PROFILED, _HOOKED = 2, 3, 4


class _Saved:
    """The bytes of the storages that autograd saves while it is entered."""

    def __init__(self, model: nn.Module) -> None:
        self._known = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
        self._seen: dict[int, int] = {}
        self._hooks = saved_tensors_hooks(self._pack, lambda t: t)

    def _pack(self, t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in self._known:
            self._seen[storage.data_ptr()] = storage.nbytes()
        return t

    def __enter__(self) -> None:
        self._hooks.__enter__()

    def __exit__(self, *error: Any) -> None:
        self._hooks.__exit__(*error)

    @property
    def bytes(self) -> int:
        return sum(self._seen.values())


class _Probe(TrainerCallback):
    """Measures one thing in each of some steps, and ends the training."""

    def __init__(self, model: nn.Module) -> None:
        self.saved = _Saved(model)
        self.profile = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
        self.resident = 0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        step = state.global_step + 1
        if step == _PROFILED:
            self.profile.__enter__()
        elif step == _HOOKED:
            self.saved.__enter__()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        step = state.global_step
        if step == _PLAIN:
            self.resident = most_resident()
        elif step == _PROFILED:
            self.profile.__exit__(None, None, None)
        elif step == _HOOKED:
            self.saved.__exit__(None, None, None)
            control.should_training_stop = True
        return control


def most_resident() -> int:
    """Bytes. The kernel's own line: getrusage would tell of the parent, where that was larger when it started this process."""
    found = re.search(r"^VmHWM:\s*(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    if found is None:
        raise RuntimeError("/proc/self/status has no line VmHWM: the most that a process held is not known here")
    return 1024 * int(found[1])


def peak_allocated(recorded: profile) -> int:
    """The largest sum of the allocations and releases that were recorded, in their order."""
    now = most = 0
    for event in sorted(recorded.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return most


def memory_here(arm: Arm, sizes: Sizes) -> dict[str, int]:
    """In this process, by measure. The arm's adapters and directions are as in the timing, dropout too."""
    model = build(arm, sizes)
    probe = _Probe(model)
    with tempfile.TemporaryDirectory() as folder:
        make_trainer(model, sizes, Path(folder), [*callbacks_of(arm), probe]).train()
    return dict(zip(MEASURES, (peak_allocated(probe.profile), probe.saved.bytes, probe.resident), strict=True))


def memory_of(arm: Arm, sizes: Sizes) -> dict[str, int]:
    """In a process of its own. Raises RuntimeError with its last lines where that fails."""
    command = [sys.executable, "-m", __name__, arm.name, *map(str, astuple(sizes))]
    path = os.pathsep.join(filter(None, sys.path))
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, env={**os.environ, "PYTHONPATH": path}, check=False
    )
    if done.returncode:
        raise RuntimeError(f"memory of {arm.name}: exit status {done.returncode}\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    name, *numbers, dtype = sys.argv[1:]
    print(json.dumps(memory_here(ARMS[name], Sizes(*map(int, numbers), dtype))))


if __name__ == "__main__":
    main()
