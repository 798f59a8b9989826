"""Which routes are tried, by shape, precision, method and card."""

from __future__ import annotations

import pytest
import torch
from support.spectra import graded, update, with_spectrum

from loradash_kernels import change_rates, task_specific_directions
from loradash_kernels.directions import policy
from loradash_kernels.directions.policy import Route, full_routes, routes_for


def test_routes_by_shape_and_card():
    f32, f64 = torch.float32, torch.float64

    def names(*arguments):
        return [str(route) for route in full_routes(*arguments)]

    assert names(64, 64, f32, "exact", None) == ["svd float32", "svd float64"]
    # An A100 is fast in float64, an RTX 3090 is not.
    assert names(64, 64, f32, "exact", True) == ["gram float64", "svd float64"]
    assert names(64, 64, f32, "exact", False) == ["svd float32", "svd float64"]
    assert names(64, 256, f32, "exact", False) == ["gram float32", "svd float32", "svd float64"]
    for fast in (None, True):
        assert names(64, 256, f32, "auto", fast) == ["gram float32", "gram float64", "svd float64"]
    assert names(64, 256, f32, "auto", False) == ["gram float32", "svd float32", "svd float64"]
    assert names(64, 64, f64, "exact", None) == ["svd float64"]
    assert names(64, 64, f64, "auto", None) == ["gram float64", "svd float64"]


@pytest.mark.parametrize("fast", [None, True, False])
@pytest.mark.parametrize("method", ["auto", "exact"])
def test_every_card_finds_the_same(monkeypatch, fast, method):
    monkeypatch.setattr(policy, "has_fast_float64", lambda device: fast)
    for n, k in ((64, 64), (40, 120)):
        w = torch.stack([graded(n, k, seed=i, condition=10.0**i + 1) for i in range(1, 5)])
        a, b = update(n, k, batch=(4,))
        truth = change_rates(w, a.double(), b.double(), method="exact").rate.topk(4).indices
        assert torch.equal(task_specific_directions(w.float(), a, b, 4, method=method).index, truth)


def test_auto_tells_graded_from_flat():
    a, b = update(96, 96)
    assert task_specific_directions(graded(96).float(), a, b, 4).routes == ("tail",)
    flat = with_spectrum(torch.linspace(2, 1, 96), 96, 96).float()
    assert task_specific_directions(flat, a, b, 4).routes == ("gram float32",)
    a, b = update(48, 192)
    assert task_specific_directions(graded(48, 192, condition=20).float(), a, b, 4).routes == ("gram float32",)
    assert task_specific_directions(graded(48, 192).float(), a, b, 4).routes == ("gram float64",)


def test_methods_and_shapes_decide_the_first_route():
    square, wide = torch.zeros(1, 64, 64), torch.zeros(1, 64, 256)
    assert [str(route) for route in routes_for(square, "auto")] == [
        "tail",
        "gram float32",
        "gram float64",
        "svd float64",
    ]
    assert routes_for(square, "randomized") == (Route("tail", rank=32),)
    assert routes_for(wide, "randomized", 100) == (Route("tail", rank=64),)
    assert "tail" not in [route.kind for route in (*routes_for(wide, "auto"), *routes_for(square, "exact"))]
