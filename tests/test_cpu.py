"""What is particular to the compiled CPU kernels: instruction sets, threads, packed weights, bytes saved."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

import loradash_kernels
from loradash_kernels import _extension, dash_linear, enable_packed_weights, packed_weight_bytes
from loradash_kernels.testing import check_error_rule, make_case, run

pytestmark = pytest.mark.skipif(not _extension.is_compiled(), reason="the compiled part is missing")

SWEEP = """
import torch
from loradash_kernels import _extension
from loradash_kernels.config import dropout_threshold
from loradash_kernels.reference import dropout_mask
from loradash_kernels.testing import check_error_rule, make_case, run
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    for shape in ((1, 1, 1, 1, 1), (37, 65, 33, 5, 3), (70, 128, 96, 16, 8), (260, 300, 64, 8, 8)):
        for p in (0.0, 0.1):
            for base in (True, False):
                case = make_case(*shape, dtype, adapter_dtype=torch.float32, dropout_p=p)
                check_error_rule(case, run(case, "cpu", base))
seed = torch.tensor([5, 6])
assert torch.equal(torch.ops.loradash_cpu.dropout_mask(seed, 9000, 9, 333), dropout_mask(seed, 9000, 9, 333))
print(*(_extension.compiled().isa(i) for i in range(3)))
"""
ORDER = ("portable", "avx2", "avx512", "avx512_bf16", "amx")


@pytest.mark.parametrize("isa", ORDER)
def test_every_instruction_set(isa):
    """Each set up to the best one of this CPU; a set beyond it falls back to that one."""
    result = subprocess.run(
        [sys.executable, "-c", SWEEP], env={**os.environ, "LORADASH_CPU_ISA": isa}, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    used = result.stdout.split()
    assert all(ORDER.index(name) <= ORDER.index(isa) for name in used), used


def test_unknown_instruction_set():
    result = subprocess.run(
        [sys.executable, "-c", SWEEP], env={**os.environ, "LORADASH_CPU_ISA": "mmx"}, capture_output=True, text=True
    )
    assert "LORADASH_CPU_ISA is 'mmx'" in result.stderr


THREADS = f"""
import sys
sys.path.insert(0, {os.path.dirname(__file__)!r})
import torch
from promises import check_same
from loradash_kernels.testing import make_case, run
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    for shape in ((40, 64, 96), (600, 96, 64), (1100, 72, 40)):
        case = make_case(*shape, 8, 4, dtype, adapter_dtype=torch.float32, dropout_p=0.2)
        results = []
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            results.append(run(case, "cpu"))
        check_same(case, "cpu", *results)
"""


def test_thread_count_changes_no_bit():
    """In a process of its own: MKL's LU was seen to hang after torch.set_num_threads went above the cores and back."""
    subprocess.run([sys.executable, "-c", THREADS], check=True)


def test_kernels_are_parallel():
    """Where PyTorch itself runs on OpenMP, so do the kernels."""
    assert _extension.compiled().parallel or "OpenMP" not in torch.__config__.parallel_info()


def test_saved_for_backward():
    """x (an alias), 4 M R bytes of P and 16 bytes of seed; nothing of size M K or M N."""
    m, k, n, r, s = 64, 96, 80, 6, 2
    case = make_case(m, k, n, r, s, dropout_p=0.1)
    t = {
        name: v.clone().requires_grad_(name in ("x", "lora_a", "lora_b", "dash_sigma"))
        for name, v in case.tensors.items()
    }
    known = {v.untyped_storage().data_ptr() for v in t.values()}
    kept = {}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda v: kept.__setitem__(v.untyped_storage().data_ptr(), v.untyped_storage().nbytes()) or v, lambda v: v
    ):
        y = dash_linear(t.pop("x"), t.pop("weight"), t.pop("bias"), dropout_p=0.1, **t)
    assert y.requires_grad
    assert sum(v for p, v in kept.items() if p not in known) <= 4 * m * (r + s) + 64


# --- packed weights --------------------------------------------------------------------------------------------------


def layer_and_input(dtype=torch.float32):
    case = make_case(128, 64, 96, s=0, bias=False, dtype=dtype)
    t = case.tensors
    weight = torch.nn.Parameter(t["weight"].clone(), requires_grad=False)
    return weight, lambda: dash_linear(case.x, weight, lora_a=t["lora_a"], lora_b=t["lora_b"] * 0)


def expect(weight, forward, x):
    torch.testing.assert_close(forward(), x @ weight.t(), rtol=1e-4, atol=1e-4)


fuses = pytest.mark.skipif(
    not (_extension.is_compiled() and _extension.compiled().fuses_base(0)),
    reason="no fused fp32 base product on this CPU",
)


@fuses
def test_packed_copy_lives_with_the_weight():
    enable_packed_weights(False)
    enable_packed_weights(True)
    weight, forward = layer_and_input()
    assert packed_weight_bytes() == 0
    forward()
    assert packed_weight_bytes() == weight.nbytes
    del weight, forward
    assert packed_weight_bytes() == 0


@fuses
@pytest.mark.parametrize(
    "write",
    [
        lambda w: w.mul_(2),
        lambda w: w.data.mul_(2),
        lambda w: setattr(w, "data", w.data * 2),
        lambda w: w.data.copy_(torch.randn_like(w)),
    ],
)
def test_writes_replace_the_packed_copy(write):
    case = make_case(128, 64, 96, s=0, bias=False)
    t = case.tensors
    weight = torch.nn.Parameter(t["weight"].clone(), requires_grad=False)
    for _ in range(2):
        x = case.x.clone().requires_grad_()
        y = dash_linear(x, weight, lora_a=t["lora_a"], lora_b=t["lora_b"] * 0)
        torch.testing.assert_close(y, x @ weight.t(), rtol=1e-4, atol=1e-4)
        y.backward(case.dy)
        torch.testing.assert_close(x.grad, case.dy @ weight, rtol=1e-4, atol=1e-4)
        with torch.no_grad():
            write(weight)


@fuses
def test_packing_switched_off():
    enable_packed_weights(False)
    try:
        case = make_case(100, 64, 96)
        check_error_rule(case, run(case))
        assert packed_weight_bytes() == 0
    finally:
        enable_packed_weights(True)


def test_inference_mode():
    with torch.inference_mode():
        case = make_case(100, 64, 96)
        t = dict(case.tensors)
        y = loradash_kernels.dash_linear(t.pop("x"), t.pop("weight"), t.pop("bias"), **t)
    assert torch.isfinite(y).all()
