"""A compiled part that is missing is named in the reasons; one that is there and does not load is warned of, too."""

from __future__ import annotations

import shutil
import subprocess
import sys
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import pytest

import loradash_kernels

REPORT = """
import sys, warnings
# An editable install would find its own compiled part.
sys.meta_path = [f for f in sys.meta_path if "Editable" not in str(f)]
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import loradash_kernels
print(loradash_kernels.available_backends()["cpu"])
print(*(f"{w.category.__name__}: {w.message}" for w in caught if "loradash" in str(w.message)), sep="|")
import torch
print(loradash_kernels.explain_backend(torch.zeros(1, 1)).backend)
"""


def report(folder: Path, file: str | None) -> list[str]:
    """(why the CPU backend is missing, warnings, the backend that runs) of a copy of the package with this `_C` file."""
    source = Path(loradash_kernels.__file__).parent
    shutil.copytree(source, folder / "loradash_kernels", ignore=shutil.ignore_patterns("_C*", "__pycache__"))
    if file:
        (folder / "loradash_kernels" / file).write_bytes(b"no shared object")
    environment = {"PYTHONPATH": str(folder)}
    result = subprocess.run(
        [sys.executable, "-c", REPORT], cwd=folder, env=environment, capture_output=True, text=True, check=True
    )
    return result.stdout.splitlines()


def test_nothing_was_compiled(tmp_path):
    reason, warned, backend = report(tmp_path, None)
    assert "is missing" in reason and "pip install" in reason
    assert not warned and backend == "reference"


@pytest.mark.parametrize("file", [f"_C{EXTENSION_SUFFIXES[0]}", "_C.cpython-34m-x86_64-linux-gnu.so"])
def test_a_file_that_does_not_load(tmp_path, file):
    reason, warned, backend = report(tmp_path, file)
    assert "there but does not load" in reason and file in reason and "rebuild it with `pip install" in reason
    assert warned.count("RuntimeWarning: loradash_kernels:") == 1 and reason in warned
    assert backend == "reference"
