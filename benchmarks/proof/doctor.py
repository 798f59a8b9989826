"""What is here: interpreter, PyTorch, card, driver, compilers, sanitizer, memory, disk; and in words what is missing.

    python -m benchmarks.proof.doctor --out facts.json

Later stages decide by these facts what they can do. It uses nothing beyond the standard library but PyTorch.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

from .ledger import Row
from .stage import ROOT
from .worker import expect, missing, passed, work

GIB = 1 << 30
# A build takes 1 GiB, the rows, logs and the caches of compilers another.
LEAST_DISK = 4 * GIB
OLDEST_TORCH = (2, 7)
# What the packages of this checkout import wherever they run, and pytest; what else there may be.
NEEDED = ("numpy", "safetensors", "tqdm", "typer", "rich", "pytest")
PACKAGES = (*NEEDED, "triton", "matplotlib", "peft", "setuptools", "ninja", "hypothesis")


def found_program(name: str, *folders: str) -> str | None:
    """The path of a program: on PATH, in CUDA_HOME, or where toolkits are installed."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    places = [f"{home}/bin", f"{home}/compute-sanitizer"] if home else []
    places += ["/usr/local/cuda/bin", "/usr/local/cuda/compute-sanitizer", "/opt/cuda/bin", *folders]
    return shutil.which(name) or shutil.which(name, path=os.pathsep.join(places))


def said_by(*command: str) -> str:
    """What a program prints, or "" where it cannot be run."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""


def version_of(package: str) -> str | None:
    if importlib.util.find_spec(package) is None:
        return None
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "unknown"


def card() -> dict[str, Any] | None:
    """The first card that PyTorch can use, or None."""
    import torch

    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(0)
    # A card that is listed may still refuse its first allocation.
    torch.ones(1, device="cuda").add_(1)
    free, total = torch.cuda.mem_get_info(0)
    return {
        "name": properties.name,
        "capability": list(torch.cuda.get_device_capability(0)),
        "processors": properties.multi_processor_count,
        "memory": total,
        "free memory": free,
        "driver": said_by("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0") or "unknown",
        "cards": torch.cuda.device_count(),
    }


def examine() -> dict[str, Any]:
    """Every fact, by name. "card" is None where there is none that works, and "card trouble" says why."""
    facts: dict[str, Any] = {
        "python": platform.python_version(),
        "system": platform.platform(),
        "cores": os.cpu_count(),
        "disk": shutil.disk_usage(ROOT).free,
        "commit": said_by("git", "-C", str(ROOT), "describe", "--always", "--dirty") or "unknown",
        "packages": {name: version_of(name) for name in PACKAGES},
        "nvcc": found_program("nvcc"),
        "compute-sanitizer": found_program("compute-sanitizer"),
        "cmake": found_program("cmake"),
        "compiler": shutil.which(os.environ.get("CXX", "c++")),
        "card": None,
        "card trouble": None,
        "torch": None,
        "torch's CUDA": None,
        "CUDA_HOME": None,
    }
    if facts["nvcc"]:
        facts["nvcc version"] = said_by(facts["nvcc"], "--version").rpartition("release ")[2].partition(",")[0]
        # Where a wrapper lies on PATH, its folder's parent is no toolkit.
        homes = (os.environ.get("CUDA_HOME"), "/usr/local/cuda", str(Path(facts["nvcc"]).resolve().parents[1]))
        facts["CUDA_HOME"] = next((home for home in homes if home and (Path(home) / "bin" / "nvcc").exists()), None)
    try:
        import torch

        facts["torch"], facts["torch's CUDA"] = torch.__version__, torch.version.cuda
        facts["card"] = card()
    except ImportError as error:
        facts["card trouble"] = f"PyTorch cannot be imported: {error}"
    except RuntimeError as error:
        facts["card trouble"] = f"PyTorch lists a card and cannot use it: {error}"
    if facts["card"] is None and facts["card trouble"] is None:
        facts["card trouble"] = why_no_card(facts)
    return facts


def why_no_card(facts: dict[str, Any]) -> str:
    """Why PyTorch sees none."""
    driver = said_by("nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader")
    if facts["torch's CUDA"] is None:
        return f"this PyTorch ({facts['torch']}) is built without CUDA" + (
            f"; the driver lists {driver}" if driver else ""
        )
    if driver:
        wanted = facts["torch's CUDA"]
        return f"PyTorch is built for CUDA {wanted}, for which the driver may be too old: {driver}"
    return "PyTorch sees no GPU, and nvidia-smi names none"


def findings(facts: dict[str, Any], rehearse: bool) -> Iterator[tuple[str, Callable[[], Row]]]:
    """A row for each thing that a stage needs: there, or missing and what that costs."""
    packages = facts["packages"]

    def needed(name: str, there: object, without: str) -> tuple[str, Callable[[], Row]]:
        return name, lambda: passed(str(there)) if there else missing(f"{name}: not found; {without}")

    torch = tuple(int(part) for part in (facts["torch"] or "0.0").split(".")[:2])
    yield "Python", lambda: expect(sys.version_info >= (3, 10), f"{facts['python']}, wanted 3.10 or newer")
    yield "PyTorch", lambda: expect(torch >= OLDEST_TORCH, f"{facts['torch']}, wanted 2.7 or newer")
    lacking = [name for name in NEEDED if not packages[name]]
    yield "packages", lambda: expect(not lacking, f"missing: {', '.join(lacking) or 'none'}")
    disk = facts["disk"] / GIB
    yield "disk", lambda: expect(facts["disk"] > LEAST_DISK, f"{disk:.1f} GiB free, wanted {LEAST_DISK / GIB:.0f}")
    if not rehearse:
        yield "card", lambda: expect(bool(facts["card"]), str(facts["card"] or facts["card trouble"]))
        yield needed("nvcc", facts["nvcc"], "no compiled part for the card, and no sanitizer run of it")
        yield needed("compute-sanitizer", facts["compute-sanitizer"], "the stage sanitize cannot run")
    yield needed("Triton", packages["triton"], "its backend is not tested")
    yield needed("C++ compiler", facts["compiler"], "no compiled part")
    yield needed("matplotlib", packages["matplotlib"], "no plots")
    yield needed("PEFT", packages["peft"], "no comparison with its layers")
    yield needed("hypothesis", packages["hypothesis"], "one file of tests is left out")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rehearse", action="store_true")
    options = parser.parse_args()
    facts = examine()
    options.out.write_text(json.dumps(facts, indent=1))
    return work(findings(facts, options.rehearse))


if __name__ == "__main__":
    sys.exit(main())
