"""The CUDA backend: hand-made kernels for NVIDIA cards from sm_80 on, in the compiled part. Importing this needs no CUDA.

A call is run by a strategy. "library", the default: these kernels write what the layer adds to its base product, and the
vendor's product is summed onto that in the same memory. "fused": one product of [x | T] and [W | Q], or its like backward,
by the tile of the compiled part's table; the name of a tile: by that tile.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from ..calls import BackwardCall, Call, ForwardCall
from . import cards, extension, tuning

name = "cuda"
OLDEST = (8, 0)
LIBRARY, FUSED = "library", "fused"
DTYPES = (torch.bfloat16, torch.float16)
_WEIGHT = {"forward": ForwardCall._fields.index("weight"), "backward": BackwardCall._fields.index("weight")}


@functools.cache
def missing() -> str | None:
    """Why the CUDA kernels cannot be used here at all, or None."""
    if extension.missing_reason is not None:
        return extension.missing_reason
    built = extension.compiled()
    if built.cuda_architectures is None:
        # Parts that older versions of this package compiled do not say why.
        why = getattr(built, "without_cuda", f"it is older than this package; rebuild it with {extension.BUILD}")
        return f"the compiled part was built without CUDA: {why}"
    return None if torch.cuda.is_available() else "PyTorch sees no GPU"


def refuses(x: Tensor, width: int = 0) -> str | None:
    """Why a call with this x and R = `width` cannot run, or None."""
    if not x.is_cuda:
        return f"x is on {x.device}"
    if x.dtype not in DTYPES:
        return f"x is {x.dtype}, the CUDA kernels take bfloat16 and float16"
    if width > _max_width():
        return f"r + s is {width}, the CUDA kernels take at most {_max_width()}"
    if cards.capability_of(x.device) < OLDEST:
        return f"the card is {cards.architecture_of(x.device)}; the CUDA kernels need sm_{OLDEST[0]}{OLDEST[1]}"
    if not _has_code(x.device):
        built = extension.compiled().cuda_architectures
        return (
            f"the compiled part has code for {built}, not for {cards.architecture_of(x.device)} (TORCH_CUDA_ARCH_LIST), "
            "or PTX of a toolkit newer than its driver"
        )
    return None


@functools.cache
def _max_width() -> int:
    return int(extension.compiled().cuda_max_width)


@functools.cache
def _has_code(device: torch.device) -> bool:
    """Was the compiled part built for this card?"""
    return bool(extension.compiled().cuda_runs_on(device.index or 0))


def forward(call: ForwardCall) -> None:
    _run(call, _strategy(call))


def backward(call: BackwardCall) -> None:
    _run(call, _strategy(call))


def candidates(call: Call) -> list[str]:
    """The strategies that could be fastest for a call: the library, where there is a product for it, and every tile; one
    where nothing is computed in tiles."""
    if isinstance(call, BackwardCall) and call.dx is None:
        return [FUSED]
    compiled = extension.compiled()
    tiles = list(compiled.cuda_tiles(compiled.cuda_card(call.x.get_device())))
    return tiles if call.weight is None else [LIBRARY, *tiles]


def _strategy(call: Call) -> str:
    """The measured strategy, or the library."""
    found = tuning.choose(name, call, lambda: candidates(call), lambda strategy: _run(call, strategy))
    return LIBRARY if found is None else found


def _run(call: Call, strategy: str) -> None:
    kernels, product = _kernels(call.pass_), _base_product(call) if strategy == LIBRARY else None
    if product is None:
        kernels(*call, "" if strategy in (LIBRARY, FUSED) else strategy)
        return
    # Without a weight they write all but the base product: bias and low-rank terms, or dx of the low-rank terms and every
    # other gradient. y and dx are in the dtype of x, W and dy, as the product wants them.
    place = _WEIGHT[call.pass_]
    kernels(*call[:place], None, *call[place + 1 :], "")
    out, left, right = product
    # Gradients are another file's business; autocast leaves products in place alone.
    with torch._C._AutoDispatchBelowAutograd():
        out.addmm_(left, right)


def _base_product(call: Call) -> tuple[Tensor, Tensor, Tensor] | None:
    """Result, left and right of the product with W, where there is one: that of y, or of a wanted dx."""
    if call.weight is None:
        return None
    if isinstance(call, ForwardCall):
        return call.y, call.x, call.weight.t()
    return None if call.dx is None else (call.dx, call.dy, call.weight)


@functools.cache
def _kernels(pass_: str) -> Callable[..., None]:
    """The compiled operator of a pass: found once, as the look-up takes a quarter of a microsecond."""
    return getattr(torch.ops.loradash_cuda, pass_).default
