"""Orthonormal bases of batches that no single method takes."""

from __future__ import annotations

import pytest
import torch
from support.spectra import graded

from loradash_kernels.directions.linalg import cholesky_qr, orthogonality_loss


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_cholesky_qr(dtype):
    """Graded, nearly dependent, of columns far apart in size, deficient: one batch, every matrix orthonormal in the end."""
    n, width = 60, 12
    well = torch.randn(n, width, dtype=torch.float64)
    deficient = well.clone()
    deficient[:, 3] = 0
    deficient[:, 5] = deficient[:, 4]
    batch = [well, graded(n, width, condition=1e6), graded(n, width, condition=1e12), deficient]
    batch.append(well * torch.logspace(-20, 20, width, dtype=torch.float64))
    x = torch.stack(batch).to(dtype)
    q, r = cholesky_qr(x)
    assert float(orthogonality_loss(q.mT @ q).max()) < 1e-12
    scale = torch.linalg.vector_norm(x.double(), dim=-2, keepdim=True) + 1e-300
    assert float(((q @ r - x.double()) / scale).abs().max()) < 1e-12
    assert torch.equal(r, r.triu())
