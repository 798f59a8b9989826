"""What the checks of chosen triplets refuse."""

from __future__ import annotations

import torch

from loradash_kernels.directions.checks import are_resolved, are_triplets


def test_vectors_that_are_not_orthonormal_fail_the_checks():
    """Residuals alone pass them: a σ of zero allows every vector, the zero vector too."""
    w, sigma = torch.zeros(1, 8, 12), torch.zeros(1, 3)
    u, vt = torch.eye(8, 3)[None], torch.eye(3, 12)[None]
    norm, index = torch.ones(1), torch.arange(5, 8)[None]
    for spoiled, good in ((u, True), (0 * u, False), (1.01 * u, False), (u[..., [0, 0, 1]], False)):
        assert are_triplets(w, norm, spoiled, vt, sigma) == [good]
        assert are_triplets(w.mT, norm, vt.mT, spoiled.mT, sigma) == [good]
        assert are_resolved(w, norm, sigma, spoiled, vt, sigma, index) == [good]
