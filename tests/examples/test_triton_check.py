"""examples/triton_check.py, rehearsed in Triton's interpreter: a process of its own."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")

WRONG = """
import torch
from examples import triton_check
def fails():
    torch.testing.assert_close(torch.ones(1), torch.zeros(1))
assert {"down_projection", "one_launch_forward", "dx_gemm", "finish", "jacobi_sweeps"} <= triton_check.KERNELS
bad = triton_check.check_all([triton_check.Check("fails", fails)], True, "cpu")
assert bad == 1 + len(triton_check.KERNELS), bad
"""


def interpreted(*arguments):
    env = {**os.environ, "TRITON_INTERPRET": "1"}
    return subprocess.run([sys.executable, *arguments], env=env, capture_output=True, text=True, cwd=ROOT)


@pytest.mark.slow
def test_every_kernel_is_right():
    done = interpreted("examples/triton_check.py")
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert " kernels, 0 bad" in done.stdout


def test_wrong_results_and_kernels_without_a_case_are_found():
    done = interpreted("-c", WRONG)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "WRONG fails" in done.stdout and "no case launched x_pass" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--list", "--only", "prelaunch"], 0, "prelaunch-jacobi"),
        (["--only", "no such case"], 2, "no case is named"),
        (["--plant", "write"], 0, "planted a write of element 1000 of 1000"),
        (["--plant", "read"], 2, "invalid choice"),
    ],
)
def test_arguments(arguments, code, said):
    done = interpreted("examples/triton_check.py", *arguments)
    assert done.returncode == code and said in done.stdout + done.stderr
