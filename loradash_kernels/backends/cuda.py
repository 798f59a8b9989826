"""The CUDA backend: hand-made kernels for NVIDIA cards from sm_80 on, in the compiled part. Importing this needs no CUDA.

`missing` and `refuses` give the reasons against it in words, `yields` the reason to leave a call to the Triton backend
unless this one was asked for; `forward` and `backward` fill what they are given.
"""

from __future__ import annotations

import functools
import os

import torch
from torch import Tensor

from .._version import __version__
from . import extension
from .triton import backend as triton_backend
from .tuning import Measurements, fastest

OLDEST = (8, 0)
TABLE, TRITON = "", "triton"  # besides the names of tiles: the table's choice, and the other backend


def _decode(entry: object) -> str:
    if not isinstance(entry, str):
        raise ValueError(f"unknown strategy {entry!r}")
    return entry


MEASURED: Measurements[str] = Measurements("cuda-tiles-1.json", str, _decode)


@functools.cache
def missing() -> str | None:
    """Why the CUDA kernels cannot be used here at all, or None."""
    if extension.missing_reason is not None:
        return extension.missing_reason
    if extension.compiled().cuda_architectures is None:
        return "the compiled part was built without CUDA; build it with a CUDA toolkit (CUDA_HOME) and a CUDA build of PyTorch"
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


def yields(x: Tensor, width: int = 0) -> str | None:
    """Why the Triton backend, which takes this x and R = `width`, is the better one, or None."""
    target = None if triton_backend.missing() else triton_backend.target_of(x.device)
    if target is None or not target.asynchronous or triton_backend.refuses(x, width):
        return None  # without matrix instructions that run beside the program, both use mma.sync
    own = "wgmma" if target.matrix_instruction == "HGMMA" else "tcgen05"
    card = triton_backend.architecture_of(x.device)
    return f"on {card} Triton uses {own}, these kernels mma.sync; ask for backend='cuda' to have them"


def forward(
    x: Tensor,  # (M, K)
    weight: Tensor | None,  # (N, K); None: the base product is in `base`
    bias: Tensor | None,  # (N,)
    lora_a: Tensor,
    lora_b: Tensor,
    dash_u: Tensor | None,
    dash_vt: Tensor | None,
    dash_sigma: Tensor | None,
    seed: Tensor | None,
    scaling: float,
    threshold: int,
    base: Tensor | None,  # (M, N)
    y: Tensor,  # (M, N), written
    p: Tensor,  # (M, R), written
) -> None:
    arguments = (x, weight, bias, lora_a, lora_b, dash_u, dash_vt, dash_sigma, seed, scaling, threshold, base, y, p)
    _run("forward", x, weight, p.shape[1], arguments)


def backward(
    dy: Tensor,  # (M, N)
    x: Tensor,
    weight: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    dash_u: Tensor | None,
    dash_vt: Tensor | None,
    dash_sigma: Tensor | None,
    p: Tensor,
    seed: Tensor | None,
    scaling: float,
    threshold: int,
    dx: Tensor | None,  # (M, K), written; None: not wanted
    da: Tensor | None,  # (r, K)
    db_lora: Tensor | None,  # (N, r)
    dsigma: Tensor | None,  # (s,)
    dbias: Tensor | None,  # (N,)
) -> None:
    options = (p, seed, scaling, threshold, dx, da, db_lora, dsigma, dbias)
    _run("backward", x, weight, p.shape[1], (dy, x, weight, lora_a, lora_b, dash_u, dash_vt, dash_sigma, *options))


def _run(direction: str, x: Tensor, weight: Tensor | None, width: int, arguments: tuple) -> None:
    with torch.cuda.device(x.device):  # events and captures are the current device's
        strategy = _choose(direction, x, weight, arguments)
    if strategy == TRITON and (triton_backend.missing() or triton_backend.refuses(x, width)):
        strategy = TABLE  # measured when Triton was there
    _execute(direction, strategy, arguments)


def _execute(direction: str, strategy: str, arguments: tuple) -> None:
    if strategy == TRITON:
        (triton_backend.forward if direction == "forward" else triton_backend.backward)(*arguments)
    else:
        getattr(torch.ops.loradash_cuda, direction)(*arguments, strategy)


def _choose(direction: str, x: Tensor, weight: Tensor | None, arguments: tuple) -> str:
    """The measured strategy for a call, or the table's. LORADASH_TUNE=1 measures at the first call of each shape."""
    tuning = os.environ.get("LORADASH_TUNE") == "1"
    if not tuning and not MEASURED.known():
        return TABLE
    wanted = tuple(
        index for index, t in enumerate(arguments) if isinstance(t, Tensor)
    )  # adapters, bias, gradients, ...
    name = key(direction, torch.cuda.get_device_name(x.device), x, weight, arguments, wanted)
    found = MEASURED.known().get(name)
    if found is None and tuning and x.shape[0] > 0 and not torch.cuda.is_current_stream_capturing():
        strategies = candidates(*extension.compiled().cuda_card(x.get_device()))
        found = tune(direction, name, strategies, arguments)
    return TABLE if found is None else found


def key(direction: str, card: str, x: Tensor, weight: Tensor | None, arguments: tuple, wanted: tuple[int, ...]) -> str:
    """What a measurement holds for: GPU, version, dtype, order of the weight and every shape but M, which is rounded up to a
    power of two; and which tensors there are, gradients that are wanted among them."""
    order = "none" if weight is None else "rows" if weight.stride(1) == 1 else "columns"
    bucket = 1 << max(x.shape[0] - 1, 0).bit_length()
    sizes = "x".join(str(arguments[index].shape[-1]) for index in wanted)
    return "/".join(map(str, (card, __version__, direction, x.dtype, order, bucket, sizes, ",".join(map(str, wanted)))))


def candidates(processors: int, shared_limit: int) -> list[str]:
    """Every strategy that could be fastest on a card."""
    tiles = extension.compiled().cuda_tiles((processors, shared_limit))
    return [*tiles, TRITON] if triton_backend.missing() is None else tiles


def tune(direction: str, name: str, strategies: list[str], arguments: tuple, timer=None) -> str:  # type: ignore[no-untyped-def]
    """Times every strategy on the call's own tensors (its outputs are written), keeps the fastest and writes the cache.

    timer: seconds (or any unit) of a callable; CUDA events unless given. Where nothing can be timed, the table's choice is
    taken for this process, with a warning.
    """
    try:
        best = fastest(strategies, lambda s: lambda: _execute(direction, s, arguments), timer or _seconds)
    except RuntimeError as error:  # the call itself may well fit
        MEASURED.warn(f"tuning failed, the table decides for {name}: {error}")
        MEASURED.known()[name] = TABLE
        return TABLE
    MEASURED.remember(name, best)
    return best


def _seconds(call, rounds: int = 10) -> float:  # type: ignore[no-untyped-def]
    """Milliseconds of a call by CUDA events, median of rounds."""
    call()
    times = []
    for _ in range(rounds):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return sorted(times)[rounds // 2]
