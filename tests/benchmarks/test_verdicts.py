"""The verdicts that were fixed before a card was measured: over synthetic rows, both outcomes of each."""

from __future__ import annotations

import pytest

from benchmarks.layers.variants import COMPILED, FROZEN, OURS, PEFT
from benchmarks.layers.verdicts import beside_frozen, beside_our_best, beside_peers, verdicts

SQUARE = {"dtype": "bf16", "M": 4096, "K": 4096, "N": 4096, "r": 16, "dropout": 0.05}


def layer(arm, ratio=None, *, forward=None, backward=None, error=None, **sizes):
    row = {"kind": "layer", "arm": arm, "error": error, **{**SQUARE, **sizes}}
    if error is None:
        row |= {"step ratio": ratio, "forward ratio": forward or ratio, "backward ratio": backward or ratio}
    return row


def strategy(arm, forward=None, backward=None, **sizes):
    times = {"forward over ours": forward, "backward over ours": backward}
    known = {name: value for name, value in times.items() if value is not None}
    return {"kind": "strategy", "arm": arm, "error": None, **{**SQUARE, **sizes}, **known}


def peers(ours, peft=1.3, compiled=1.2, **sizes):
    return [layer(OURS, ours, **sizes), layer(PEFT, peft, **sizes), layer(COMPILED, compiled, **sizes)]


def test_beside_peers_holds_everywhere():
    found = beside_peers([*peers(1.1), *peers(1.236, M=8192), layer(FROZEN, 1.0)])
    assert found.holds is True
    assert found.worst.value == pytest.approx(1.03) and "8192x" in found.worst.where


@pytest.mark.parametrize(("time_", "word"), [("wall", "wall"), ("graph", "graph")])
def test_beside_peers_looks_at_all_three_times(time_, word):
    rows = peers(1.1)
    for row, ratio in zip(rows, (1.5, 1.4, 1.6), strict=True):
        row[f"{time_} ratio"] = ratio
    found = beside_peers(rows)
    assert found.holds is False and len(found.numbers) == 2
    assert found.worst.value == pytest.approx(1.5 / 1.4) and found.worst.where.startswith(word)


@pytest.mark.parametrize("better", [{"peft": 1.05}, {"compiled": 1.05}])
def test_beside_peers_fails_at_one_shape(better):
    found = beside_peers([*peers(1.1), *peers(1.1, M=1024, **better)])
    assert found.holds is False
    assert found.worst.value == pytest.approx(1.1 / 1.05) and "1 of 2 beyond the limit" in str(found)


def test_beside_peers_is_not_decided_where_a_peer_is_missing():
    rows = [layer(OURS, 1.1), layer(PEFT, 1.3), layer(COMPILED, error="no compiler")]
    found = beside_peers(rows)
    assert found.holds is None and found.missing == (f"device of {COMPILED}, bf16 4096x4096x4096, r 16, dropout 0.05",)
    assert beside_peers([layer(OURS, 1.5), layer(PEFT, 1.3)]).holds is False, "what is there decides"


@pytest.mark.parametrize("without", [0, 1, 2])
def test_beside_peers_is_not_decided_where_one_has_no_graph(without):
    rows = peers(1.1)
    for place, row in enumerate(rows):
        row["graph ratio"] = None if place == without else 1.2
    found = beside_peers(rows)
    assert found.holds is None and found.missing[0].startswith(f"graph of {rows[without]['arm']}")


@pytest.mark.parametrize("verdict", [beside_peers, beside_frozen])
def test_ours_that_failed_its_check_fails(verdict):
    rows = [layer(OURS, error="AssertionError: y[0, 0]"), layer(PEFT, 1.3), layer(COMPILED, 1.2)]
    found = verdict(rows)
    assert found.holds is False and "AssertionError" in str(found)


def test_beside_our_best():
    rows = [strategy("cuda library", 1.01, 0.98), strategy("cuda 128x256", 0.975), strategy("triton fused", None, 1.2)]
    found = beside_our_best(rows)
    assert found.holds is True
    assert found.worst.value == pytest.approx(1 / 0.975) and found.worst.where.startswith("forward, cuda 128x256")
    assert beside_our_best([*rows, strategy("triton descriptors", None, 0.9)]).holds is False


def test_a_strategy_without_a_time_says_nothing():
    row = {**strategy("triton fused"), "error": "OutOfResources"}
    assert beside_our_best([row]).holds is None


@pytest.mark.parametrize(
    ("forward", "backward", "holds"), [(1.05, 1.09, True), (1.06, 1.0, False), (1.0, 1.1, False), (0.99, 1.0, True)]
)
def test_beside_frozen(forward, backward, holds):
    assert beside_frozen([layer(OURS, 1.0, forward=forward, backward=backward)]).holds is holds


@pytest.mark.parametrize("sizes", [{"N": 11008}, {"M": 1024}, {"dtype": "fp32"}, {"r": 64}])
def test_beside_frozen_is_for_the_square_layer(sizes):
    assert beside_frozen([layer(OURS, 2.0, **sizes)]).numbers == ()


def test_nothing_measured_decides_nothing():
    found = verdicts([])
    assert set(found) == {"beside peers", "beside our best", "beside frozen"}
    assert all(verdict.holds is None and "nothing measured" in str(verdict) for verdict in found.values())
