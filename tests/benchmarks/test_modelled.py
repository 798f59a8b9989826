"""The modelled cost of a layer: what moves is what docs/design.md's table says, and the ways keep their order."""

from __future__ import annotations

import pytest

from benchmarks.layers.modelled import CARDS, SHAPES, WIDTH, bound, frozen, rows, ways

M, K, N = 8192, 4096, 11008
X, Y, W = M * K, M * N, N * K
MOVED = {
    ("library", "forward"): 2 * X + 3 * Y + W,
    ("library", "backward"): 3 * X + 2 * Y + W + X,
    ("fused", "forward"): 2 * X + Y + W,
    ("fused", "backward"): 2 * X + 2 * Y + W,
    ("one launch", "forward"): X + Y + W,
    ("one launch", "backward"): 2 * X + Y + W,
}


@pytest.mark.parametrize(("way", "pass_"), MOVED)
def test_what_moves(way, pass_):
    """Beside M x R and R x (K + N), which are small."""
    elements = sum(launch.elements for launch in ways(M, K, N)[way][pass_])
    small = elements - MOVED[way, pass_]
    assert 0 <= small <= 9 * WIDTH * (M + N + K)


def test_the_frozen_layer_moves_each_operand_once():
    assert {pass_: found[0].elements for pass_, found in frozen(M, K, N).items()} == dict.fromkeys(
        ("forward", "backward"), X + Y + W
    )


@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.name)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_fewer_passes_are_never_slower(card, shape):
    for pass_, base in frozen(*shape).items():
        times = [bound(found[pass_], card, 0.8) for found in ways(*shape).values()]
        assert times == sorted(times, reverse=True) and times[-1] >= bound(base, card, 0.8)


def test_a_faster_product_leaves_the_passes_more_weight():
    ratio = {e: next(iter(rows(e)))["forward / frozen"] for e in (0.6, 1.0)}
    assert 1 < ratio[0.6] < ratio[1.0]
