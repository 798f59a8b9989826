"""The device that an option names."""

from __future__ import annotations

import torch

HELP = "cpu, cuda, cuda:1, ...; by default the GPU where there is one."


def chosen_device(name: str | None) -> torch.device:
    """The device of that name; without one the first GPU, or the CPU where there is none.

    Raises ValueError for names of other devices, and for a GPU that PyTorch does not see.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"--device {name!r} is no device; wanted {HELP}") from error
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"--device {name!r}: only CPUs and GPUs of CUDA or ROCm are served; wanted {HELP}")
    if device.type == "cpu":
        return device
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if (device.index or 0) >= count:
        raise ValueError(f"--device {name!r}: {_seen(count)}")
    return device


def _seen(count: int) -> str:
    if count:
        return (
            f"PyTorch sees {count} GPU{'s' if count > 1 else ''}, cuda:0{f' to cuda:{count - 1}' if count > 1 else ''}"
        )
    built = torch.version.cuda or torch.version.hip
    why = f"built for {'ROCm' if torch.version.hip else 'CUDA'} {built}" if built else "a build without CUDA"
    return f"PyTorch {torch.__version__} ({why}) sees no GPU; `loradash info` tells what is there"


def devices() -> list[torch.device]:
    """The CPU and every GPU that PyTorch sees."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return [torch.device("cpu"), *(torch.device("cuda", index) for index in range(count))]


def synchronize(device: torch.device) -> None:
    """Waits for a GPU to finish; a CPU has by the time of the call."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
