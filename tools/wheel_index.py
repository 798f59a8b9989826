"""Which PyTorch the NVIDIA driver of this machine runs, as arguments for pip; standard library only.

    python tools/wheel_index.py              # prints e.g. torch==2.13.0 --index-url https://download.pytorch.org/whl/cu126
    python tools/wheel_index.py install      # installs it into this interpreter, unless it has a PyTorch already

A wheel runs on drivers of its CUDA's major version and newer: PyPI's torch 2.11 to 2.14 are built for CUDA 13.0, so on a driver
of CUDA 12 they see no GPU. The compiled kernels need a toolkit of the wheel's major version, so a toolkit of CUDA 12 (CUDA_HOME,
or the nvcc on the PATH) decides for a wheel of CUDA 12 on a newer driver too.

Where the figures are from: CUDA and Triton of PyPI's wheels from their metadata (2.7.1 and 2.8.0: CUDA 12.6 and 12.8; 2.9.1,
2.10.0: 12.8; 2.11.0 to 2.14.1: 13.0); the indexes from PyTorch's release matrix (2.13: CUDA 12.6, 13.0, 13.2; 12.8 was last
built for 2.11; no wheel of CUDA 12.6 has code for Blackwell). The wheels of the indexes themselves were not downloaded.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

TORCH = "torch==2.13.0"
# The last release with wheels of CUDA 12.8, which have code for Blackwell.
TORCH_CU128 = "torch==2.11.0"
INDEX = "https://download.pytorch.org/whl"
BLACKWELL = (10, 0)
Version = tuple[int, int]


class NoWheel(Exception):
    """No supported PyTorch runs here. The text says what was found and what to install."""


def choose(driver: Version | None, cards: Sequence[Version] = (), toolkit: Version | None = None) -> list[str]:
    """pip's arguments for a driver's CUDA version (None: no NVIDIA driver), the cards' compute capabilities and the version
    of nvcc (None: no toolkit). Raises NoWheel."""
    if driver is None:
        return [TORCH, "--index-url", f"{INDEX}/cpu"]
    if driver < (12, 0):
        raise NoWheel(
            f"the NVIDIA driver runs CUDA {dotted(driver)}, and the supported PyTorch and Triton need 12.0 or newer; install driver 580 "
            "or newer (CUDA 13), or at least 525.60.13 (CUDA 12)"
        )
    if driver >= (13, 0) and (toolkit is None or toolkit[0] != 12):
        return [TORCH]
    if any(card >= BLACKWELL for card in cards):
        if driver < (12, 8):
            raise NoWheel(
                f"the card is a Blackwell and the NVIDIA driver runs CUDA {dotted(driver)}; install driver 570 or newer (CUDA 12.8)"
            )
        return [TORCH_CU128, "--index-url", f"{INDEX}/cu128"]
    return [TORCH, "--index-url", f"{INDEX}/cu126"]


def dotted(version: Version) -> str:
    return f"{version[0]}.{version[1]}"


def answer(*command: str | Path) -> str:
    """What a program prints; nothing where it is missing or fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return ""


def driver_version() -> Version | None:
    """The newest CUDA that the NVIDIA driver runs, as nvidia-smi's head says; None without a driver."""
    # Newer drivers tell the versions of their parts apart: "CUDA UMD Version".
    found = re.search(r"CUDA(?: UMD)? Version\s*:\s*(\d+)\.(\d+)", answer("nvidia-smi"))
    return (int(found[1]), int(found[2])) if found else None


def card_capabilities() -> list[Version]:
    told = answer("nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader")
    return [(int(major), int(minor)) for major, minor in re.findall(r"^\s*(\d+)\.(\d+)\s*$", told, re.M)]


def toolkit_version() -> Version | None:
    """The version of the nvcc that setup.py would take."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    nvcc = Path(home, "bin", "nvcc") if home else Path(shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc")
    found = re.search(r"release (\d+)\.(\d+)", answer(nvcc, "--version"))
    return (int(found[1]), int(found[2])) if found else None


def here() -> list[str]:
    """pip's arguments for this machine."""
    return choose(driver_version(), card_capabilities(), toolkit_version())


def install(arguments: list[str]) -> int:
    """pip's exit code. Where PyTorch's CPU index is out of reach, the default one serves: what runs on a CPU is the same."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install"]
    if arguments[-1] != f"{INDEX}/cpu":
        return subprocess.call([*pip, *arguments])
    return subprocess.call([*pip, "--retries", "0", "--timeout", "5", *arguments]) and subprocess.call(
        [*pip, arguments[0]]
    )


def main(command: Sequence[str]) -> int:
    try:
        if list(command) == ["install"] and importlib.util.find_spec("torch"):
            return 0
        arguments = here()
    except NoWheel as reason:
        cpu = " ".join(choose(None))
        print(f"{reason}. For the CPU alone: pip install {cpu}", file=sys.stderr)
        return 1
    if list(command) == ["install"]:
        return install(arguments)
    print(*arguments)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
