"""What is particular to the compiled CPU kernels: instruction sets, threads, bytes saved."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from loradash_kernels import dash_linear
from loradash_kernels.backends import extension
from loradash_kernels.testing import make_case

pytestmark = pytest.mark.skipif(not extension.is_compiled(), reason="the compiled part is missing")

SWEEP = """
import torch
from loradash_kernels.backends import extension
from loradash_kernels.random import dropout_mask, dropout_threshold, window
from loradash_kernels.testing import check_error_rule, check_group_error_rule, make_case, make_group, run, run_group
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    for shape in ((1, 1, 1, 1, 1), (37, 65, 33, 5, 3), (70, 128, 96, 16, 8), (260, 300, 64, 8, 8)):
        for p in (0.0, 0.1):
            for base in (True, False):
                case = make_case(*shape, dtype, adapter_dtype=torch.float32, dropout_p=p)
                check_error_rule(case, run(case, "cpu", base))
    cases = make_group(150, 65, [(50, 5, 3), (96, 16, 0), (33, 0, 2)], dtype, adapter_dtype=torch.float32, dropout_p=0.1)
    check_group_error_rule(cases, run_group(cases, "cpu"))
seed = torch.tensor([5, 6])
for part in (seed, window(seed, 7, 40)):
    assert torch.equal(torch.ops.loradash_cpu.dropout_mask(part, 9000, 9, 333), dropout_mask(part, 9000, 9, 333))
print(*(extension.compiled().isa(i) for i in range(3)))
"""
TESTS = Path(__file__).parents[2]
ORDER = ("portable", "avx2", "avx512", "avx512_bf16", "amx")


def run_script(script, **environment):
    """A process of its own, in which tests' helpers can be imported as here."""
    path = os.pathsep.join(filter(None, (str(TESTS), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "PYTHONPATH": path, **environment}
    return subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("isa", ORDER)
def test_every_instruction_set(isa):
    """Each set up to the best one of this CPU; a set beyond it falls back to that one."""
    result = run_script(SWEEP, LORADASH_CPU_ISA=isa)
    assert result.returncode == 0, result.stderr
    used = result.stdout.split()
    assert all(ORDER.index(name) <= ORDER.index(isa) for name in used), used


def test_unknown_instruction_set():
    assert "LORADASH_CPU_ISA is 'mmx'" in run_script(SWEEP, LORADASH_CPU_ISA="mmx").stderr


THREADS = """
import torch
from support.promises import check_same
from loradash_kernels import low_rank_update
from loradash_kernels.testing import make_case, run

def low_rank_terms(case, y):
    x, a, b = (case.tensors[n].clone().requires_grad_() for n in ("x", "lora_a", "lora_b"))
    torch.manual_seed(case.seed)
    out = low_rank_update(y, x, lora_a=a, lora_b=b, dropout_p=case.dropout_p, backend="cpu")
    return dict(zip(("out", "x", "lora_a", "lora_b"), (out, *torch.autograd.grad(out, (x, a, b), case.dy))))

for dtype in (torch.float32, torch.bfloat16, torch.float16):
    for shape in ((40, 64, 96), (600, 96, 64), (1100, 72, 40)):
        case = make_case(*shape, 8, 4, dtype, adapter_dtype=torch.float32, dropout_p=0.2)
        y, layers, updates = torch.randn_like(case.dy), [], []
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            layers.append(run(case, "cpu"))
            updates.append(low_rank_terms(case, y))
        check_same(case, "cpu", *layers)
        assert all(torch.equal(u[n], updates[0][n]) for u in updates for n in u), (dtype, shape)
"""


def test_thread_count_changes_no_bit():
    """In a process of its own: MKL's LU was seen to hang after torch.set_num_threads went above the cores and back.
    Where the library computes the base product, y and dx of the whole layer are as reproducible as it is, no more."""
    result = run_script(THREADS)
    assert result.returncode == 0, result.stderr


def test_kernels_are_parallel():
    """Where PyTorch itself runs on OpenMP, so do the kernels."""
    assert extension.compiled().parallel or "OpenMP" not in torch.__config__.parallel_info()


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
