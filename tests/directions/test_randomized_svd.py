"""Truncated SVDs of batches, from both ends of the spectrum, against float64 LAPACK."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from support.spectra import graded, with_spectrum

from loradash_kernels import batched_randomized_svd


@pytest.mark.parametrize("end", ["head", "tail"])
@pytest.mark.parametrize(("n", "k"), [(60, 60), (90, 50), (50, 90)])
def test_svd_against_lapack(end, n, k):
    w = graded(n, k)
    u, sigma, vt = batched_randomized_svd(w, 6, end=end, power_iters=4, generator=torch.Generator().manual_seed(0))
    true = torch.linalg.svdvals(w)
    true = true[:6] if end == "head" else true[-6:]
    torch.testing.assert_close(sigma, true, rtol=1e-6, atol=0)
    for basis in (u, vt.mT):
        torch.testing.assert_close(basis.mT @ basis, torch.eye(6, dtype=torch.float64), rtol=0, atol=1e-9)
    assert torch.linalg.vector_norm(w @ vt.mT - u * sigma) < 1e-3 * true[0]
    assert torch.linalg.vector_norm(w.mT @ u - vt.mT * sigma) < 1e-3 * true[0]


def test_svd_batches_and_dtypes():
    w = torch.stack([graded(40, seed=i, condition=10.0 ** (i + 2)) for i in range(4)]).view(2, 2, 40, 40)
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        u, sigma, vt = batched_randomized_svd(w.to(dtype), 3, power_iters=3)
        assert u.shape == (2, 2, 40, 3)
        assert sigma.shape == (2, 2, 3)
        assert vt.shape == (2, 2, 3, 40)
        assert sigma.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    full = torch.linalg.svdvals(w)[..., -3:]
    found = batched_randomized_svd(w, 3, power_iters=5, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(found.sigma, full, rtol=1e-6, atol=0)


@pytest.mark.parametrize(("power_iters", "error"), [(2, 4e-4), (3, 6e-6), (4, 1e-7)])
def test_each_step_sharpens_the_tail(power_iters, error):
    """The relative error of sigma, the median over draws and weights of condition 100, where convergence is slowest.

    It falls 60-fold a step: each bound is passed by a step fewer.
    """
    w = torch.stack([graded(40, seed=i, condition=100.0) for i in range(8)])
    full = torch.linalg.svdvals(w)[..., -3:]
    draws = [torch.Generator().manual_seed(seed) for seed in range(20)]
    found = [batched_randomized_svd(w, 3, power_iters=power_iters, generator=draw).sigma for draw in draws]
    assert float((torch.stack(found) / full - 1).abs().amax(-1).median()) < error


def test_a_matrix_gets_the_same_in_every_batch():
    """One sketch serves all matrices of a batch, so what else is in it does not count."""
    w = torch.stack([graded(40, seed=i).float() for i in range(5)])
    alone, all_of_them = (
        batched_randomized_svd(some, 3, generator=torch.Generator().manual_seed(0)) for some in (w[3:4], w)
    )
    for one, many in zip(alone, all_of_them, strict=True):
        torch.testing.assert_close(one[0], many[3], rtol=1e-5, atol=1e-5)


def test_svd_of_singular_matrices():
    """Exact zeros: the null space comes out, with sigma at rounding level, and nothing is NaN."""
    w = with_spectrum([1, 0.5, 0.1, 0.05], 12, 12).float()
    for matrix in (w, torch.zeros(12, 12), torch.ones(12, 12)):
        u, sigma, vt = batched_randomized_svd(matrix, 5)
        assert all(torch.isfinite(t).all() for t in (u, sigma, vt))
        assert float(sigma.max()) < 1e-4
        assert float((matrix @ vt.mT).abs().max()) < 1e-4


def test_svd_is_reproducible():
    w = graded(30).float()
    first = batched_randomized_svd(w, 4, generator=torch.Generator().manual_seed(3))
    again = batched_randomized_svd(w, 4, generator=torch.Generator().manual_seed(3))
    # The signs, which the draw decides, are the same too.
    for a, b in zip(first, again, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(
    ("w", "options", "message"),
    [
        (torch.zeros(4), {"rank": 1}, "w has shape"),
        (torch.zeros(4, 4), {"rank": 5}, "rank is 5"),
        (torch.zeros(4, 4), {"rank": 0}, "rank is 0"),
        (torch.zeros(4, 4), {"rank": 1, "end": "middle"}, "end must be"),
        (torch.full((4, 4), torch.nan), {"rank": 1}, "not finite"),
    ],
)
def test_svd_bad_input(w, options, message):
    with pytest.raises(ValueError, match=message):
        batched_randomized_svd(w, **options)


AFTER_SET_NUM_THREADS = """
import torch
from loradash_kernels import batched_randomized_svd
w = torch.randn(24, 384, 384, generator=torch.Generator().manual_seed(0))
last = torch.linalg.svdvals(w)[:, -8:]
for threads in (2, 1, 2):
    torch.set_num_threads(threads)
    found = batched_randomized_svd(w, 16, power_iters=6).sigma[:, -8:]
    assert torch.allclose(found, last, rtol=1e-2, atol=1e-4), (threads, (found - last).abs().max())
"""


def test_the_tail_after_the_number_of_threads_was_set():
    """MKL's LU of a batch is garbage then, pivots and all. In a process of its own: the setting stays."""
    done = subprocess.run([sys.executable, "-c", AFTER_SET_NUM_THREADS], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
