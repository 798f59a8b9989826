"""What `loradash info` tells: software, cards, which backend each dtype takes on each device, and what would serve better."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import re
import shutil
import subprocess
from pathlib import Path

import torch
from torch import Tensor

from loradash_kernels import BackendChoice, __version__, explain_backend
from loradash_kernels.backends import extension
from loradash_kernels.timing import card_facts

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# Plain PyTorch is what float64, which is for checks, always takes.
SERVED = DTYPES[:3]
PAGE = "docs/install.md"
SECONDS = 10.0


def software() -> dict[str, str]:
    """Versions, and what the compiled part was built for, by name."""
    return {
        "loradash-kernels": __version__,
        "PyTorch": f"{torch.__version__}, {_built_for()}",
        "Triton": _version("triton"),
        "toolkit": _toolkit(),
        "compiled part": _compiled_part(),
    }


def _built_for() -> str:
    if torch.version.hip:
        return f"built for ROCm {torch.version.hip}"
    return f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _toolkit() -> str:
    """The CUDA compiler that a build would find: that of CUDA_HOME or CUDA_PATH, on PATH, or in the usual folder."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    found = [str(Path(home, "bin", "nvcc")) for home in homes if home]
    found += [path for path in (shutil.which("nvcc"), "/usr/local/cuda/bin/nvcc") if path]
    for nvcc in found:
        release = re.search(r"release ([\d.]+)", _said(nvcc, "--version"))
        if release:
            return f"nvcc {release[1]}, {nvcc}"
    return "no nvcc (CUDA_HOME, PATH, /usr/local/cuda)"


def _compiled_part() -> str:
    if extension.missing_reason is not None:
        return extension.missing_reason
    compiled = extension.compiled()
    cards = f"CUDA for {compiled.cuda_architectures}" if compiled.cuda_architectures is not None else "without CUDA"
    return f"{cards}; compiler {compiled.compiler()}"


def about(device: torch.device) -> str:
    """What identifies a card and its driver; of the CPU, the instructions that the compiled part uses."""
    if device.type == "cpu":
        return f"instructions {extension.compiled().isa(0)}" if extension.is_compiled() else "no compiled part"
    facts = card_facts(device)
    card, capability, driver, newest = (facts[name] for name in ("card", "capability", "driver", "driver's CUDA"))
    return f"{card}, compute capability {capability}, driver {driver}, which runs CUDA up to {newest}"


def choices(device: torch.device) -> dict[torch.dtype, BackendChoice]:
    """Which backend each dtype takes on a device."""
    return {dtype: explain_backend(_sample(dtype, device)) for dtype in DTYPES}


def _sample(dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.empty(1, 1, dtype=dtype, device=device)


def advice(device: torch.device, found: dict[torch.dtype, BackendChoice]) -> list[str]:
    """What to do where plain PyTorch computes what kernels are there for: a paragraph for the dtypes that lack the same."""
    lacking: dict[str, list[str]] = {}
    for dtype in SERVED:
        choice = found[dtype]
        if choice.backend == "reference":
            own = ("cpu",) if device.type == "cpu" else ("cuda", "triton")
            why = "; ".join(f"{name}: {choice.reasons[name]}" for name in own)
            remedy = choice.remedy or "Build the compiled part"
            text = f"{why}. {remedy}{'' if PAGE in remedy else f' ({PAGE})'}."
            lacking.setdefault(text, []).append(str(dtype).removeprefix("torch."))
    return [f"Plain PyTorch computes {', '.join(names)} on {device}, slowly. {text}" for text, names in lacking.items()]


def unseen_cards() -> str | None:
    """Cards that a driver knows and PyTorch does not see, and why that may be; None where there are none."""
    if torch.cuda.is_available():
        return None
    listed = _said("nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader").strip().splitlines()
    if not listed:
        return None
    why = (
        f"PyTorch is built for CUDA {torch.version.cuda}, for which the driver may be too old"
        if torch.version.cuda
        else "PyTorch is built without CUDA"
    )
    return f"There is a card that PyTorch does not see ({'; '.join(listed)}): {why}. {PAGE} tells which build fits the driver."


def _said(*command: str) -> str:
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        return subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=True).stdout
    return ""
