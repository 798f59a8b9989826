"""Decompositions in the form that is kept, and the directions that are chosen from them."""

from __future__ import annotations

import math

import pytest
import torch
from support.spectra import gaussian, with_spectrum

from loradash_kernels import change_rates, task_specific_directions
from loradash_kernels.directions.checks import residuals
from loradash_kernels.directions.kept import KeptDecomposition, choose_directions, decompose_to_keep


@pytest.mark.parametrize(("n", "k"), [(384, 384), (96, 400), (400, 96)])
def test_choice_from_what_is_kept(n, k):
    """The same directions as from W itself, by the exact route in float64; vectors to full precision from half."""
    w, a, b = gaussian(n, k)
    (kept,) = decompose_to_keep(w)
    assert kept.route == ("tail" if n == k else "gram float32")
    found = choose_directions(kept, w, a, b, 8, scaling=2.0)
    exact = task_specific_directions(w.double(), a.double(), b.double(), 8, scaling=2.0, method="exact")
    assert found.index.tolist() == exact.index.tolist()
    torch.testing.assert_close(found.rate.double(), exact.rate, rtol=1e-3, atol=0)
    torch.testing.assert_close(found.sigma.double(), exact.sigma, rtol=1e-4, atol=1e-7)
    for ours, theirs in ((found.u.mT, exact.u.mT), (found.vt, exact.vt)):
        assert ((ours.double() * theirs).sum(-1).abs() > 1 - 1e-5).all()
    assert (residuals(w[None], found.u[None], found.vt[None], found.sigma[None]) <= 1e-5).all()


def test_half_precision_is_half_the_memory():
    w, _, _ = gaussian(96, 400)
    (kept,) = decompose_to_keep(w)
    assert kept.bytes == 96 * 96 * 2 + 96 * 4
    assert kept.u.dtype == torch.float16 and kept.vt is None


def rectangular(n, k, condition, shape, seed=0):
    """A weight (n, k) of this condition number whose spectrum falls evenly, in one last step, or off a cliff."""
    short = min(n, k)
    few = short // 4
    sigma = {
        "graded": torch.logspace(0, -math.log10(condition), short, dtype=torch.float64),
        "one small": torch.cat((torch.linspace(2, 1, short - 1), torch.tensor([2 / condition]))).double(),
        "cliff": torch.cat((torch.linspace(2, 1, short - few), torch.linspace(3, 2, few) / condition)).double(),
    }[shape]
    return with_spectrum(sigma, n, k, seed).float()


@pytest.mark.parametrize("shape", ["graded", "one small", "cliff"])
@pytest.mark.parametrize(("n", "k"), [(64, 96), (96, 64), (128, 512)])
def test_every_condition_is_served_from_what_is_kept(n, k, shape):
    """Half a basis in half precision where W allows it, all triplets in float32 where not: the directions of W itself."""
    _, a, b = gaussian(n, k)
    for condition in (3, 30, 49, 51, 100, 300, 1e3, 1e4, 1e5, 1e6):
        w = rectangular(n, k, condition, shape)
        (kept,) = decompose_to_keep(w)
        halved = kept.u is None or kept.vt is None
        assert halved == (condition < 50)
        assert kept.bytes == (2 * min(n, k) ** 2 if halved else 4 * min(n, k) * (n + k)) + 4 * min(n, k)
        found, plain = choose_directions(kept, w, a, b, 8), task_specific_directions(w, a, b, 8)
        assert found is not None, condition
        assert found.index.sort().values.tolist() == plain.index.sort().values.tolist(), condition
        order = [plain.index.tolist().index(i) for i in found.index.tolist()]
        for ours, theirs in ((found.u.mT, plain.u.mT), (found.vt, plain.vt)):
            assert ((ours * theirs[order]).sum(-1).abs() > 0.999).all(), condition
            torch.testing.assert_close(ours @ ours.mT, torch.eye(8), atol=5e-4, rtol=0)


@pytest.mark.parametrize(("n", "k"), [(48, 48), (32, 80), (80, 32)])
@pytest.mark.parametrize("rank", [0, 1, 20, 31])
def test_deficient_weights_are_kept_orthonormal(n, k, rank):
    """Null spaces have no directions of their own, but what is chosen from them is orthonormal on both sides."""
    g = torch.Generator().manual_seed(0)
    w = torch.randn(n, rank, generator=g) @ torch.randn(rank, k, generator=g) / 10
    _, a, b = gaussian(n, k)
    for method in ("auto", "exact"):
        (kept,) = decompose_to_keep(w, method)
        found = choose_directions(kept, w, a, b, 6)
        if found is None and kept.route == "tail":
            # It is too short for this null space: the turn of all triplets.
            continue
        assert found is not None and torch.isfinite(found.rate).all()
        for basis in (found.u.mT, found.vt):
            torch.testing.assert_close(basis @ basis.mT, torch.eye(6), atol=1e-4, rtol=0)
        assert (w @ found.vt.mT - found.u * found.sigma).abs().max() < 1e-5


def test_vectors_that_are_no_directions_are_refused():
    """Zero vectors have no residual where σ is zero; they are no directions."""
    _, a, b = gaussian(6, 8)
    kept = KeptDecomposition("svd float32", torch.zeros(6), torch.zeros(6, 6), torch.eye(6, 8))
    assert choose_directions(kept, torch.zeros(6, 8), a, b, 3) is None


def test_float64_is_kept_in_float64():
    w = rectangular(64, 96, 1e5, "graded").double()
    _, a, b = gaussian(64, 96)
    (kept,) = decompose_to_keep(w)
    assert kept.u.dtype == torch.float64
    found, plain = (choose_directions(kept, w, a.double(), b.double(), 8), task_specific_directions(w, a, b, 8))
    torch.testing.assert_close(found.rate, plain.rate, rtol=1e-9, atol=0)


def test_clustered_spectrum():
    """Twenty equal singular values have no directions of their own, but the chosen triplets are triplets."""
    sigma = torch.cat((torch.linspace(3, 1.5, 44, dtype=torch.float64), torch.ones(20, dtype=torch.float64)))
    w = with_spectrum(sigma, 64, 64).float()
    _, a, b = gaussian(64, 64, seed=1)
    (kept,) = decompose_to_keep(w)
    found = choose_directions(kept, w, a, b, 6)
    assert (residuals(w[None], found.u[None], found.vt[None], found.sigma[None]) < 1e-3).all()
    torch.testing.assert_close(found.u.mT @ found.u, torch.eye(6), atol=1e-3, rtol=0)


def test_rank_deficient():
    w = with_spectrum([*torch.linspace(2, 1, 60), 0, 0, 0, 0], 64, 64).float()
    _, a, b = gaussian(64, 64, seed=1)
    (kept,) = decompose_to_keep(w, "exact")
    found = choose_directions(kept, w, a, b, 4)
    # The rate of a zero σ is |δ| / eps.
    assert kept.sigma[60:].max() < 1e-5 and (found.index >= 60).all()


def test_exact_has_every_triplet():
    w, a, b = gaussian(128, 128)
    (kept,) = decompose_to_keep(w, "exact")
    assert kept.sigma.shape == (128,)
    rates = change_rates(w, a, b, method="exact").rate
    assert choose_directions(kept, w, a, b, 5).index.tolist() == rates.topk(5).indices.tolist()


def test_deterministic_and_batched():
    many = torch.stack([gaussian(128, 128, seed=s)[0] for s in range(3)])
    together, again = decompose_to_keep(many), decompose_to_keep(many)
    assert all(((x.u * y.u).sum(0).abs() > 1 - 1e-4).all() for x, y in zip(together, again, strict=True))
    assert len(together) == 3


def test_another_weights_triplets_are_refused():
    w, a, b = gaussian(96, 400)
    other, _, _ = gaussian(96, 400, seed=1)
    assert choose_directions(decompose_to_keep(other)[0], w, a, b, 8) is None


@pytest.mark.parametrize("s", [0, 500])
def test_bad_number_of_directions(s):
    w, a, b = gaussian(96, 400)
    with pytest.raises(ValueError, match=f"s is {s}"):
        choose_directions(decompose_to_keep(w)[0], w, a, b, s)
