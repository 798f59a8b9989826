"""What a build with CUDA must pass where there is no GPU: links, imports, registers, traces.

`make cuda-check` runs it; on a machine with a GPU the operator's own tests follow with backend="cuda".
"""

from __future__ import annotations

import ast
import os
import re
import subprocess
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import loradash_kernels as lk
from loradash_kernels.backends import extension
from loradash_kernels.calls import ForwardCall
from loradash_kernels.testing import make_case

NVCC = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin" / "nvcc"


def shipped() -> list[int]:
    """CUDA_ARCHITECTURES of setup.py as nvcc numbers them, those that the toolkit knows."""
    setup = ast.parse((Path(__file__).parents[3] / "setup.py").read_text())
    assigned = [node for node in setup.body if isinstance(node, ast.Assign)]
    (listed,) = [a.value for a in assigned if ast.unparse(a.targets[0]) == "CUDA_ARCHITECTURES"]
    known = subprocess.run([NVCC, "--list-gpu-code"], capture_output=True, text=True, check=True).stdout.split()
    return [100 * major + 10 * minor for major, minor in ast.literal_eval(listed) if f"sm_{major}{minor}" in known]


def test_build():
    found = extension.compiled().cuda_architectures
    chosen = os.environ.get("TORCH_CUDA_ARCH_LIST")
    if chosen:
        asked = [(int(major), int(minor)) for major, minor in re.findall(r"(\d+)\.(\d)", chosen)]
        assert {*found} >= {100 * major + 10 * minor for major, minor in asked if major >= 8}
        return
    assert {*shipped()} <= {*found}
    # Where there is a card, its own may be one more.
    assert torch.cuda.is_available() or found == shipped()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_card_is_not_a_card_without_code():
    with pytest.raises(RuntimeError):
        extension.compiled().cuda_runs_on(0)


def test_operators_take_tiles():
    for name in ("forward", "backward"):
        assert getattr(torch.ops.loradash_cuda, name).default._schema.arguments[-1].name == "tile"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_says_what_is_missing():
    assert lk.available_backends()["cuda"] == "PyTorch sees no GPU"
    case = make_case(4, 8, 8, 2, 2, torch.bfloat16)
    tensors = dict(case.tensors)
    x, weight, bias = tensors.pop("x"), tensors.pop("weight"), tensors.pop("bias")
    with pytest.raises(RuntimeError, match="backend='cuda' cannot run: PyTorch sees no GPU"):
        lk.dash_linear(x, weight, bias, **tensors, backend="cuda")


@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
def test_traces_on_fake_cuda_tensors(dropout_p):
    """Shapes, dtypes and devices, as torch.compile sees them. The backward operator is called by itself: PyTorch's engine asks
    the driver for the device even of fake tensors."""
    with FakeTensorMode(), torch.no_grad():

        def empty(*shape, dtype=torch.float32):
            return torch.empty(*shape, dtype=dtype, device="cuda")

        x, weight = empty(2, 5, 16, dtype=torch.bfloat16), empty(24, 16, dtype=torch.bfloat16)
        adapters = [empty(4, 16), empty(24, 4), empty(24, 3), empty(3, 16), empty(3)]
        names = ("lora_a", "lora_b", "dash_u", "dash_vt", "dash_sigma")
        y = lk.dash_linear(x, weight, None, **dict(zip(names, adapters, strict=True)), dropout_p=dropout_p)
        assert y.shape == (2, 5, 24) and y.dtype == torch.bfloat16 and y.device.type == "cuda"
        dy, p = empty(10, 24, dtype=torch.bfloat16), empty(10, 7)
        grads = torch.ops.loradash.dash_linear_backward(
            dy, x.view(10, 16), weight, *adapters, p, None, 2.0, 0, [True] * 5, None
        )
        assert [tuple(g.shape) for g in grads] == [(10, 16), (4, 16), (24, 4), (3,), (24,)]
        assert all(g.device.type == "cuda" for g in grads)


def test_launch_errors_name_the_kernel():
    """Without a GPU the first launch must fail, in words."""
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    x, weight, y = (torch.zeros(shape, dtype=torch.bfloat16) for shape in ((8, 16), (8, 16), (8, 8)))
    absent = dict.fromkeys(("bias", "dash_u", "dash_vt", "dash_sigma", "seed", "base"))
    adapters = {"lora_a": torch.zeros(2, 16), "lora_b": torch.zeros(8, 2), "scaling": 1.0, "threshold": 0}
    call = ForwardCall(x=x, weight=weight, y=y, p=torch.empty(8, 2), **adapters, **absent)
    with pytest.raises(Exception, match=r"[Cc][Uu][Dd][Aa]|device"):
        torch.ops.loradash_cuda.forward(*call)
