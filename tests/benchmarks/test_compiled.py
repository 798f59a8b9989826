"""The compiled models' table says where adapters cost a graph, a break or a compilation, or change a loss."""

from __future__ import annotations

import pytest

from benchmarks.compiled.__main__ import table, wrong
from benchmarks.compiled.counts import Phase, gap

PLAIN = {"model": "T5", "backend": "aot_eager", "layers": "plain", "phase": "after launch"}
COUNTS = {"graphs": 1, "graph breaks": 0, "recompilations": 1}


def rows(**ours):
    adapted = {**PLAIN, "layers": "adapted", **COUNTS, "gap": 1e-6}
    return [{**PLAIN, **COUNTS, "gap": ""}, adapted | {name.replace("_", " "): value for name, value in ours.items()}]


def test_a_good_table():
    assert wrong(rows()) == [] == wrong(rows(graphs=0, recompilations=0))
    assert table(rows()).splitlines()[-1] == "| T5 | aot_eager | adapted | after launch | 1 | 0 | 1 | 1e-06 |"


@pytest.mark.parametrize("ours", [{"graphs": 2}, {"graph_breaks": 1}, {"recompilations": 2}, {"gap": 0.01}])
def test_what_is_wrong_is_named(ours):
    (line,) = wrong(rows(**ours))
    assert "('T5', 'aot_eager', 'after launch')" in line and str(*ours.values()) in line


def test_gaps_are_relative_and_the_largest():
    assert gap(Phase(1, 0, 0, (2.0, 4.4)), Phase(1, 0, 0, (2.0, 4.0))) == pytest.approx(0.1)
    with pytest.raises(ValueError, match=r"shorter|longer"):
        gap(Phase(1, 0, 0, (2.0,)), Phase(1, 0, 0, (2.0, 4.0)))
