"""Weights of a given spectrum, and updates of them."""

from __future__ import annotations

import torch


def with_spectrum(sigma, n, k, seed=0):
    """A matrix (n, k) in float64 with these singular values."""
    g = torch.Generator().manual_seed(seed)
    u = torch.linalg.qr(torch.randn(n, len(sigma), generator=g, dtype=torch.float64))[0]
    v = torch.linalg.qr(torch.randn(k, len(sigma), generator=g, dtype=torch.float64))[0]
    return (u * torch.as_tensor(sigma, dtype=torch.float64)) @ v.mT


def graded(n, k=None, seed=0, condition=1e4):
    """Singular values that fall evenly, on a logarithmic scale, from 1 to 1 / condition."""
    return with_spectrum(
        torch.logspace(0, -torch.log10(torch.tensor(condition)).item(), min(n, k or n)), n, k or n, seed
    )


def update(n, k, r=4, seed=1, batch=()):
    """LoRA's factors A (*batch, r, k) and B (*batch, n, r)."""
    g = torch.Generator().manual_seed(seed)
    return 0.01 * torch.randn(*batch, r, k, generator=g), 0.01 * torch.randn(*batch, n, r, generator=g)


def gaussian(n, k, seed=0):
    """A Gaussian weight, graded at the small end where square and flat where not, and the factors of an update."""
    g = torch.Generator().manual_seed(seed)
    w = torch.randn(n, k, generator=g) / k**0.5
    return w, 0.01 * torch.randn(8, k, generator=g), 0.01 * torch.randn(n, 8, generator=g)
