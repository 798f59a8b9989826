"""What is the same bits from run to run: the sums that our own kernels take. A library may sum in another order wherever
memory is aligned otherwise or threads are fewer, so its sums are judged by the error rule alone."""

from __future__ import annotations

import torch

from loradash_kernels.backends import extension
from loradash_kernels.testing import Case, check_error_rule

DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def own_sums(backend: str, case: Case, fused: bool = False) -> tuple[str, ...]:
    """The output and gradients of `dash_linear` into which no library's sum enters.

    fused: a tile of a GPU's kernels was asked for, which take the base product, too; by default that is the library's.
    """
    if backend == "reference":
        return ()
    low_rank = ("bias", "lora_a", "lora_b", "dash_sigma")
    if backend == "cpu":
        rows = extension.compiled().min_base_rows(DTYPE_CODES[case.x.dtype])
        fused = rows != 0 and case.x.shape[0] >= rows
    return ("y", "x", *low_rank) if fused else low_rank


def check_same(case: Case, backend: str, *results: dict[str, torch.Tensor], moved: bool = False) -> None:
    """Results of one case by one backend: all within the error rule, and of the same bits where that is promised.

    moved: they were computed from memory of other strides, which the CPU kernels alone promise to be the same to them.
    """
    for found in results:
        check_error_rule(case, found)
    if moved and backend != "cpu":
        return
    for name in own_sums(backend, case):
        assert all(torch.equal(found[name], results[0][name]) for found in results[1:]), f"{name} differs"
