"""Both forms of a decomposition answer alike, and exactly as the float64 SVD says."""

from __future__ import annotations

import pytest
import torch
from support.spectra import graded, update

from loradash_kernels.directions.decompositions import TwoSided, gram_decomposition


@pytest.fixture(params=[(24, 60), (60, 24)], ids=["wide", "tall"])
def both(request):
    """One batch, as the SVD gives it and as the Gram matrix does."""
    w = torch.stack([graded(*request.param, seed=i, condition=20) for i in range(3)])
    return w, TwoSided(*torch.linalg.svd(w, full_matrices=False)), gram_decomposition(w, torch.float64)


def test_both_forms_give_the_same(both):
    w, svd, gram = both
    n, k = w.shape[-2:]
    a, b = (t.double() for t in update(n, k, batch=(3,)))
    torch.testing.assert_close(gram.sigma, svd.sigma)
    torch.testing.assert_close(svd.overlap(a, b), (svd.u.mT @ b @ a @ svd.vt.mT).diagonal(dim1=-2, dim2=-1))
    torch.testing.assert_close(gram.overlap(a, b), svd.overlap(a, b))
    which = torch.tensor([[1, 23], [0, 5], [7, 6]])
    for found in (svd, gram):
        u, sigma, vt = found.columns(which)
        assert u.shape == (3, n, 2) and sigma.shape == (3, 2) and vt.shape == (3, 2, k)
        torch.testing.assert_close(w @ vt.mT, u * sigma[..., None, :])
        assert torch.equal(found.index(which), which)
        full = found.full()
        torch.testing.assert_close((full.u * full.sigma[..., None, :]) @ full.vt, w)
        few = found.take([2])
        torch.testing.assert_close(few.overlap(a[2:], b[2:]), found.overlap(a, b)[2:])
        # Where all are meant, nothing is copied.
        assert found.take([0, 1, 2]).sigma is found.sigma


def test_a_tail_counts_from_the_end(both):
    _, svd, _ = both
    tail = TwoSided(svd.u[..., -8:], svd.sigma[..., -8:], svd.vt[..., -8:, :])
    which = torch.tensor([[0, 7]] * 3)
    assert tail.index(which).tolist() == [[16, 23]] * 3


def test_what_is_kept(both):
    """One side in half precision up to a condition number of 50, both sides above."""
    w, svd, gram = both
    wide = w.shape[-2] < w.shape[-1]
    compact = gram.take([0]).compact(torch.float32)
    kept, left_out = (compact.u, compact.vt) if wide else (compact.vt, compact.u)
    assert kept.dtype == torch.float16 and left_out is None and compact.sigma.dtype == torch.float32
    ill = gram_decomposition(graded(*w.shape[-2:], condition=60)[None], torch.float64).compact(torch.float32)
    assert ill.u.dtype == ill.vt.dtype == torch.float32
    assert all(t.is_contiguous() for t in svd.take([0]).compact(torch.float32))
