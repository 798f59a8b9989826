"""Pre-launch of one layer on a device over one torch.linalg.svd of its weight: one timing a shape."""

from __future__ import annotations

import time
from typing import Any

import torch

from loradash_kernels import direction_recall, task_specific_directions

DIRECTIONS = 8
WARM = 96


def _seconds(call: Any, device: torch.device) -> tuple[float, Any]:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    found = call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start, found


def prelaunch_row(n: int, k: int, device: torch.device) -> dict[str, Any]:
    """Seconds of the SVD and of the directions by "auto", and which share of the exact ones these are.

    W is Gaussian: graded at its small end where square, flat where not. Right are the directions that the SVD tells.
    """
    generator = torch.Generator(device).manual_seed(0)

    def factors(n: int, k: int) -> tuple[torch.Tensor, ...]:
        shapes = ((n, k, k**-0.5), (8, k, 0.01), (n, 8, 0.01))
        return tuple(torch.randn(1, a, b, generator=generator, device=device) * scale for a, b, scale in shapes)

    def directions(w: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> Any:
        return task_specific_directions(w, a, b, DIRECTIONS, scaling=2.0, method="auto")

    # Libraries load their kernels at the first call of each.
    small = factors(WARM, WARM)
    torch.linalg.svd(small[0], full_matrices=False)
    directions(*small)
    w, a, b = factors(n, k)
    svd, (u, sigma, vt) = _seconds(lambda: torch.linalg.svd(w, full_matrices=False), device)
    auto, found = _seconds(lambda: directions(w, a, b), device)
    rates = ((u.mT @ b) * (vt @ a.mT)).sum(-1).abs() / sigma
    right = rates.topk(DIRECTIONS).indices
    return {
        "step ms": 1e3 * auto,
        "svd ms": 1e3 * svd,
        "svd / auto": svd / auto,
        "top 8 found": float(direction_recall(found.index, right).mean()),
        "routes": ", ".join(found.routes),
    }
