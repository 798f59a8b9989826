"""Where tests run: the device that --device names, the backends that can run there, and what each of them refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from loradash_kernels import available_backends
from loradash_kernels.backends import registry
from loradash_kernels.backends.triton import backend as triton_backend

# The backends that are made for a type of device.
MADE_FOR = {"cpu": ("cpu", "triton", "reference"), "cuda": ("cuda", "triton", "reference")}
# The largest r + s that the kernels of a GPU take, and the dtypes of x by backend. These are written down here, and not
# asked of the backends, so that one which refuses what it should take fails its tests.
MAX_WIDTH = 256
TAKES = {
    "cpu": (torch.float32, torch.bfloat16, torch.float16),
    "cuda": (torch.bfloat16, torch.float16),
    "triton": (torch.float32, torch.bfloat16, torch.float16),
    "reference": (torch.float32, torch.bfloat16, torch.float16, torch.float64),
}


def wanted_device(text: str) -> torch.device:
    """The device that --device names: cpu, cuda or cuda:N. Raises pytest.UsageError where it is not there."""
    try:
        device = torch.device(text)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in MADE_FOR:
        raise pytest.UsageError(f"--device is {text!r}, wanted cpu, cuda or cuda:N")
    if device.type == "cpu":
        return device
    if not torch.cuda.is_available():
        raise pytest.UsageError(
            f"--device {text}: PyTorch {torch.__version__} sees no GPU; --device cpu runs without one"
        )
    if (device.index or 0) >= torch.cuda.device_count():
        raise pytest.UsageError(f"--device {text}: PyTorch sees {torch.cuda.device_count()} GPUs")
    if triton_backend.interpreted():
        raise pytest.UsageError(f"--device {text}: TRITON_INTERPRET=1 runs Triton's kernels on the CPU; unset it")
    return torch.device("cuda", device.index or 0)


def wanted_shard(text: str) -> tuple[int, int]:
    """(i, n) of "i/n", 0 <= i < n. Raises pytest.UsageError."""
    try:
        index, count = map(int, text.split("/"))
    except ValueError:
        index, count = 0, 0
    if not 0 <= index < count:
        raise pytest.UsageError(f"--shard is {text!r}, wanted I/N with 0 <= I < N")
    return index, count


def why_not(name: str, device: torch.device) -> str | None:
    """Why a backend cannot run on a device at all, or None."""
    if device.type == "cpu":
        if name == "triton" and not triton_backend.interpreted():
            return "Triton's kernels run on the CPU with TRITON_INTERPRET=1 alone"
        return available_backends()[name]
    (backend,) = (b for b in registry.BACKENDS if b.name == name)
    return backend.missing() or backend.refuses(torch.empty(1, 1, dtype=torch.bfloat16, device=device))


def backends_on(device: torch.device) -> list[Any]:
    """Parameters of tests: every backend that can run on a device. On a GPU one that is made for it and cannot run is there,
    too, and skipped with the reason."""
    found: list[Any] = []
    for name in MADE_FOR[device.type]:
        reason = why_not(name, device)
        if reason is None:
            found.append(name)
        elif device.type != "cpu":
            found.append(pytest.param(name, marks=pytest.mark.skip(reason=f"backend {name} cannot run: {reason}")))
    return found


def refusal(name: str, dtype: torch.dtype, width: int = 0) -> str | None:
    """The words, a pattern, with which a backend refuses x of this dtype or R = r + s = `width`; None where it must run."""
    if dtype not in TAKES[name]:
        return rf"backend='{name}' cannot run: x is {dtype}, the \w+ kernels take "
    if name in ("cuda", "triton") and width > MAX_WIDTH:
        return rf"backend='{name}' cannot run: r \+ s is {width}, the \w+ kernels take at most {MAX_WIDTH}"
    return None


def plain_dtype(name: str) -> torch.dtype:
    """float32, or the widest that this backend takes: for tests that are about something else."""
    return torch.float32 if torch.float32 in TAKES[name] else torch.float16
