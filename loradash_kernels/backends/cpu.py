"""The CPU backend: the compiled part's kernels for x86 and whatever else a C++ compiler knows."""

from __future__ import annotations

import torch
from torch import Tensor

from ..calls import KERNEL_DTYPES, BackwardCall, ForwardCall, GroupBackwardCall, GroupForwardCall
from . import extension

name = "cpu"

if extension.is_compiled():
    # They are found once: the look-up takes a quarter of a microsecond in every call.
    _forward, _backward = (getattr(torch.ops.loradash_cpu, p).default for p in ("forward", "backward"))
    _group_forward, _group_backward = (
        getattr(torch.ops.loradash_cpu, f"group_{p}").default for p in ("forward", "backward")
    )


def missing() -> str | None:
    """Why the CPU kernels cannot be used here at all, or None."""
    return extension.missing_reason


def refuses(x: Tensor, width: int = 0) -> str | None:
    """Why a call with this x and R = `width` cannot run, or None."""
    if not x.is_cpu:
        return f"x is on {x.device}"
    if x.dtype not in KERNEL_DTYPES:
        return f"x is {x.dtype}, the compiled kernels take float32, bfloat16 and float16"
    return None


def forward(call: ForwardCall) -> None:
    _forward(*call)


def backward(call: BackwardCall) -> None:
    _backward(*call)


def group_forward(call: GroupForwardCall) -> None:
    _group_forward(*call)


def group_backward(call: GroupBackwardCall) -> None:
    _group_backward(*call)
