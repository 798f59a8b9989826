"""The loop of attempts: who is settled by which route."""

from __future__ import annotations

import torch
from support.spectra import graded, with_spectrum

from loradash_kernels.directions.decompose import decompose, in_order
from loradash_kernels.directions.policy import Route

ROUTES = Route("gram", torch.float32), Route("svd", torch.float32), Route("svd", torch.float64)


def settle(w, check=lambda attempt, which: [True] * len(which), **options):
    """The routes of all matrices, and what was settled."""
    settled = decompose(w, ROUTES, lambda attempt: list(attempt.which), check, **options)
    for _, which, position in in_order(settled):
        assert position < len(which)
    return [str(route) for route, _, _ in in_order(settled)], settled


def mixed():
    """Well conditioned, graded, singular, well conditioned."""
    w = [graded(20, 40, condition=5), graded(20, 40, condition=1e4), with_spectrum([1, 0.5], 20, 40)]
    return torch.stack([*w, graded(20, 40, seed=1, condition=5)]).float()


def test_every_matrix_takes_the_first_route_that_its_spectrum_allows():
    routes, settled = settle(mixed())
    assert routes == ["gram float32", "svd float32", "svd float64", "gram float32"]
    assert [part.which for part in settled] == [[0, 3], [1], [2]]


def test_a_check_sends_matrices_on_but_never_past_the_last_route():
    seen = []

    def check(attempt, which):
        seen.append((str(attempt.route), list(attempt.which)))
        return [i == 3 for i in which]

    routes, _ = settle(mixed(), check)
    assert routes == ["svd float64", "svd float64", "svd float64", "gram float32"]
    assert seen == [("gram float32", [0, 3]), ("svd float32", [0, 1])]


def test_together_all_take_one_route():
    assert settle(mixed(), together=True)[0] == ["svd float64"] * 4
    assert settle(mixed()[:2], together=True)[0] == ["svd float32"] * 2
    assert settle(mixed()[[0, 3]], together=True)[0] == ["gram float32"] * 2


def test_nothing_is_settled_of_an_empty_batch():
    (part,) = settle(torch.zeros(0, 4, 6), together=True)[1]
    assert part.which == [] and str(part.route) == "gram float32"


def test_an_attempt_holds_the_matrices_it_is_about():
    w = mixed()

    def choose(attempt):
        assert torch.equal(attempt.w, w[attempt.which])
        assert attempt.found.sigma.shape[0] == attempt.norms.shape[0] == len(attempt.which)
        torch.testing.assert_close(attempt.norms.float(), torch.linalg.matrix_norm(attempt.w, 2))
        return None

    decompose(w, ROUTES, choose, lambda attempt, _: [True] * len(attempt.which))
