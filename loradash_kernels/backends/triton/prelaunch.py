"""The kernels of the pre-launch phase: what `directions/kernels.py` asks of a backend.

Each `plan_` function is a pure function of tensors that gives one kernel launch as data; the others run them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .kernels.prelaunch import highest_rates, jacobi_sweeps, sketch_product
from .problem import KernelLaunch, power_of_two, tile_count
from .target import FENCED, triton_version

# The most sweeps of Jacobi rotations: five to eight do, more say that something is wrong.
SWEEPS = 20
# Two rows of a float32 matrix count as orthogonal where their cosine is no larger.
TOLERANCE = 2e-6
# The largest cosine that may be left after the last sweep.
ORTHOGONAL = 1e-5
# The most triplets whose rates one program compares in its registers.
MAX_TRIPLETS = 8192
# The largest LoRA rank that the kernel of change rates holds in one tile.
MAX_RANK = 256


def plan_sketch(w: Tensor, seed: Tensor, y: Tensor, precision: str = "ieee") -> KernelLaunch:
    """y (L, N, width) float32 = w (L, N, K) times the Gaussian sketch of this seed (2,)."""
    count, n, k = w.shape
    width = y.shape[-1]
    block_j = min(64, power_of_two(width))
    args = {"w": w, "seed": seed, "y": y, "N": n, "K": k, "width": width}
    args |= dict(zip(("stride_wl", "stride_wn", "stride_wk"), w.stride(), strict=True))
    constants = {"BLOCK_N": 64, "BLOCK_J": block_j, "BLOCK_K": 16, "PRECISION": precision}
    # Three products of TF32 are matrix instructions, which on some cards need a fence after a copy ahead (see `target`).
    stages = 2 if precision == "ieee" or triton_version() >= FENCED else 1
    return KernelLaunch(
        sketch_product, (tile_count(n, 64), tile_count(width, block_j), count), args, constants, 8, stages
    )


def plan_jacobi(x: Tensor, off: Tensor) -> KernelLaunch:
    """Rotates the rows of x (L, rows, length) float32, contiguous, in place; off (L,)."""
    count, rows, length = x.shape
    block = power_of_two(length)
    pairs = max(1, min(2048 // block, power_of_two(rows // 2)))
    args = {"x": x, "off": off, "rows": rows, "length": length}
    constants = {"SWEEPS": SWEEPS, "TOLERANCE": TOLERANCE, "BLOCK_P": pairs, "BLOCK": block}
    return KernelLaunch(jacobi_sweeps, (count,), args, constants, max(4, pairs * block // 256))


def plan_rates(
    u: Tensor,  # (L, N, n)
    v: Tensor,  # (L, K, n)
    sigma: Tensor,  # (L, n)
    b: Tensor,  # (L, N, r)
    at: Tensor,  # (L, K, r)
    scaling: float,
    eps: float,
    one_sided: bool,
    out: tuple[Tensor, Tensor, Tensor],  # rate (L, n), best (L, s), index (L, s)
) -> KernelLaunch:
    """Arguments as the kernel names them; `one_sided` where v is u and at is W Aᵀ."""
    rate, best, index = out
    count, rows, n = u.shape
    args = {"u": u, "v": v, "sigma": sigma, "b": b, "at": at, "scaling": scaling, "eps": eps}
    args |= {"rate": rate, "best": best, "index": index}
    args |= {"arrived": torch.zeros(count, dtype=torch.int32, device=u.device)}
    args |= {"n": n, "N": rows, "K": v.shape[1], "rank": b.shape[-1], "s": best.shape[-1]}
    for tensor, names in ((u, "ul un ui"), (v, "vl vk vi"), (b, "bl bn br"), (at, "al ak ar")):
        args |= {f"stride_{name}": stride for name, stride in zip(names.split(), tensor.stride(), strict=True)}
    constants = {"ONE_SIDED": one_sided, "RANK": power_of_two(b.shape[-1]), "BLOCK_I": 32, "BLOCK_K": 16}
    constants["BLOCK_ALL"] = power_of_two(n)
    # A rank of 256 needs more registers than four warps have on consumer Blackwell.
    warps = 8 if constants["RANK"] >= 256 else 4
    return KernelLaunch(highest_rates, (tile_count(n, 32), count), args, constants, warps, 2)


def sketch(w: Tensor, seed: Tensor, width: int) -> Tensor:
    """(L, N, width) float32: w (L, N, K) times the Gaussian sketch (K, width) of this seed, which is never in memory."""
    y = w.new_empty(*w.shape[:-1], width, dtype=torch.float32)
    tensor_cores = w.is_cuda and not torch.version.hip and torch.cuda.get_device_capability(w.device)[0] in (8, 9)
    plan_sketch(w, seed, y, "tf32x3" if tensor_cores and w.dtype == torch.float32 else "ieee").run()
    return y


def jacobi(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """sigma (L, n) descending, vt (L, n, K), and whether the rotations converged (L,), of x (L, n, K) float32, n <= K.

    Rows of vt that belong to a zero sigma are zero.
    """
    # Squares of what is divided by its largest element neither overflow nor vanish.
    peak = x.abs().amax((-2, -1), keepdim=True)
    peak = torch.where(peak > 0, peak, 1.0)
    rotated = (x / peak).contiguous()
    off = x.new_empty(x.shape[0])
    if rotated.numel():
        plan_jacobi(rotated, off).run()
    sigma, order = torch.linalg.vector_norm(rotated, dim=-1).sort(-1, descending=True)
    vt = rotated.gather(-2, order[..., None].expand_as(rotated)) / sigma.clamp_min(1e-38)[..., None]
    return sigma * peak[..., 0], vt, off <= ORTHOGONAL


def takes(n: int, rank: int) -> bool:
    """Does the kernel of change rates take so many triplets at this LoRA rank?"""
    return n <= MAX_TRIPLETS and rank <= MAX_RANK


def rates(
    u: Tensor,  # (L, N, n)
    v: Tensor,  # (L, K, n)
    sigma: Tensor,  # (L, n)
    b: Tensor,  # (L, N, r)
    at: Tensor,  # (L, K, r)
    s: int,
    scaling: float,
    eps: float,
    one_sided: bool,
) -> tuple[Tensor, Tensor]:
    """The s highest change rates and their indices (L, s); arguments as `plan_rates`."""
    count, n = sigma.shape
    rate, best = u.new_empty(count, n), u.new_empty(count, s)
    index = torch.empty(count, s, dtype=torch.int64, device=u.device)
    plan_rates(u, v, sigma.contiguous(), b, at, scaling, eps, one_sided, (rate, best, index)).run()
    return best, index
