"""The dropout mask on the device: the bits that the CPU draws for a seed, in every pass that uses one, and their statistics.

Masks are read out of results in which nothing else is left: unit vectors for the rows of D and of dy, ones everywhere else.
"""

from __future__ import annotations

import torch
from support.matrix import Way, poisoned

from loradash_kernels.backends import registry, tuning
from loradash_kernels.calls import BackwardCall, ForwardCall
from loradash_kernels.random import draw_seed, dropout_mask, dropout_threshold
from loradash_kernels.testing import make_case

# R = 16 columns of a mask are read at a time.
RANK = 16
ADAPTERS = (None, None, None)
# Seeds of windows: near the whole's first element, and so far away that a sign could be lost.
WINDOWS = ((5, 7, 3, 40), (5, 7, 2**31 - 5, 2**31 - 8), (5, 7, 2**32 - 17, 2**32 - 24))


def masks_of(way: Way, m: int, k: int, seed: torch.Tensor, threshold: int) -> dict[str, torch.Tensor]:
    """(M, K) bool: what P, dA and dx of this way say about the mask."""
    (backend,) = (b for b in registry.BACKENDS if b.name == way.backend)
    case = make_case(m, k, RANK, RANK, 0, way.dtype, adapter_dtype=torch.float32, device=seed.device)
    x, weight, b = torch.ones_like(case.x), torch.zeros_like(case.tensors["weight"]), torch.eye(RANK).to(seed.device)
    p, da, dx = (x.new_full((m, size), torch.nan, dtype=torch.float32) for size in (k, k, k))
    with poisoned(seed.device), tuning.forced(way.backend, **(way.forced(case) or {})):
        for start in range(0, k, RANK):
            rows = torch.zeros(RANK, k, device=seed.device)
            rows[:, start : start + RANK].fill_diagonal_(1)
            y, found = x.new_empty(m, RANK), x.new_empty(m, RANK, dtype=torch.float32)
            options = (seed, 1.0, threshold, None)
            backend.forward(ForwardCall(x, weight, None, rows, b, *ADAPTERS, *options, y, found))
            assert torch.equal(y.float().sign(), found.sign()), "y and P disagree"
            p[:, start : start + RANK] = found[:, : k - start]
        ones = torch.ones(RANK, k, device=seed.device)
        for start in range(0, m, RANK):
            dy = torch.zeros_like(case.dy)
            dy[start : start + RANK].fill_diagonal_(1)
            found, low = (torch.empty(RANK, k, device=seed.device), torch.empty_like(x))
            grads = (low, found, None, None, None)
            given = (dy, x, weight, ones, b, *ADAPTERS, x.new_zeros(m, RANK, dtype=torch.float32))
            backend.backward(BackwardCall(*given, seed, 1.0, threshold, *grads))
            da[start : start + RANK] = found[: m - start]
            dx[start : start + RANK] = low[start : start + RANK].float()
    found = {"P": p, "dA": da, "dx": dx}
    assert not any(t.isnan().any() for t in found.values())
    return {name: t != 0 for name, t in found.items()}


def test_every_pass_draws_the_bits_of_the_cpu(way: Way, sizes, device):
    (m, k), threshold = sizes.mask, dropout_threshold(0.3)
    torch.manual_seed(5)
    seed = draw_seed(device)
    wanted = dropout_mask(seed.cpu(), threshold, m, k)
    for name, mask in masks_of(way, m, k, seed, threshold).items():
        assert torch.equal(mask.cpu(), wanted), f"{name}: {int((mask.cpu() != wanted).sum())} of {m * k} bits differ"


def test_extreme_seeds(backend, device):
    """All bits of key and counter matter, the sign's too, and the place of a window."""
    way = Way(backend, torch.bfloat16)
    for numbers in ((0, 0), (-1, 2**63 - 1), (3, -(2**63)), (0x1234_5678_9ABC_DEF0, -1), *WINDOWS):
        seed = torch.tensor(numbers)
        wanted = dropout_mask(seed, 1 << 15, 17, 24)
        found = masks_of(way, 17, 24, seed.to(device), 1 << 15)
        assert all(torch.equal(mask.cpu(), wanted) for mask in found.values()), numbers


def test_shares_and_independence(device, sizes):
    """Kept shares of the whole, of rows and of columns; neighbours and two seeds are uncorrelated: within five sigma."""
    m, k = sizes.statistics
    p = dropout_threshold(0.1) / 65536
    one, two = (dropout_mask(draw_seed(device), dropout_threshold(0.1), m, k).double() - (1 - p) for _ in range(2))
    variance = p * (1 - p)
    assert one.mean().abs() < 5 * (variance / (m * k)) ** 0.5
    for axis, count in ((0, m), (1, k)):
        # The largest of some thousand means: seven sigma are exceeded once in 10^11.
        assert one.mean(axis).abs().max() < 7 * (variance / count) ** 0.5
    for a, b in ((one[1:], one[:-1]), (one[:, 1:], one[:, :-1]), (one[:, 8:], one[:, :-8]), (one, two)):
        assert (a * b).mean().abs() < 5 * variance / (a.numel()) ** 0.5
