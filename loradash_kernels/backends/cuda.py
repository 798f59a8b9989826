"""The CUDA backend: hand-made kernels for NVIDIA cards from sm_80 on, in the compiled part. Importing this needs no CUDA."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ..calls import BackwardCall, Call, ForwardCall
from . import extension, tuning

name = "cuda"
OLDEST = (8, 0)


@functools.cache
def missing() -> str | None:
    """Why the CUDA kernels cannot be used here at all, or None."""
    if extension.missing_reason is not None:
        return extension.missing_reason
    if extension.compiled().cuda_architectures is None:
        return f"the compiled part was built without CUDA: {extension.compiled().without_cuda}"
    return None if torch.cuda.is_available() else "PyTorch sees no GPU"


def refuses(x: Tensor, width: int = 0) -> str | None:
    """Why a call with this x and R = `width` cannot run, or None."""
    if x.device.type != "cuda":
        return f"x is on {x.device}"
    if x.dtype not in (torch.bfloat16, torch.float16):
        return f"x is {x.dtype}, the CUDA kernels take bfloat16 and float16"
    limit = extension.compiled().cuda_max_width
    if width > limit:
        return f"r + s is {width}, the CUDA kernels take at most {limit}"
    capability = torch.cuda.get_device_capability(x.device)
    if capability < OLDEST:
        return f"the card is sm_{capability[0]}{capability[1]}; the CUDA kernels need sm_80"
    if not _has_code(x.device):
        built = extension.compiled().cuda_architectures
        return (
            f"the compiled part has code for {built}, not for sm_{capability[0]}{capability[1]} (TORCH_CUDA_ARCH_LIST)"
        )
    return None


@functools.cache
def _has_code(device: torch.device) -> bool:
    """Was the compiled part built for this card?"""
    return bool(extension.compiled().cuda_runs_on(device.index or 0))


def forward(call: ForwardCall) -> None:
    _run(call, _tile(call))


def backward(call: BackwardCall) -> None:
    _run(call, _tile(call))


def _run(call: Call, tile: str) -> None:
    getattr(torch.ops.loradash_cuda, call.pass_)(*call, tile)


def _tile(call: Call) -> str:
    """The name of the measured tile, or "": the compiled part takes that of its table."""

    def tiles() -> list[str]:
        compiled = extension.compiled()
        return compiled.cuda_tiles(compiled.cuda_card(call.x.get_device()))

    return tuning.choose(name, call, tiles, lambda tile: _run(call, tile)) or ""
