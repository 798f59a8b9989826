"""Whole models of transformers under torch.compile: one graph, which launch leaves as it is. `make bench-compile` has the others."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.processes import run_processes

from benchmarks.compiled.counts import adapted, compiled, gap, trained
from benchmarks.compiled.models import SHALLOW

pytestmark = pytest.mark.slow


COUNTS = {"before launch": (1, 0, 0), "after launch": (0, 0, 0), "other shapes": (1, 0, 1)}


@pytest.mark.parametrize(("name", "phases"), [("Llama", 3), ("GPT-2", 2), ("BERT", 2)])
def test_one_graph_for_both_phases(name, phases):
    """With dropout, whose masks are those of eager calls; new batches and lengths take what sizes as symbols take: one more."""
    expected_counts = dict(list(COUNTS.items())[:phases])
    model = adapted(SHALLOW[name], dropout=0.25)
    expected = trained(model, model, [*expected_counts])
    found = compiled(adapted(SHALLOW[name], dropout=0.25), "aot_eager", [*expected_counts])
    assert {phase: (p.graphs, p.breaks, p.recompilations) for phase, p in found.items()} == expected_counts
    for phase in found:
        assert gap(found[phase], expected[phase]) <= 1e-6, phase


ROOT = Path(__file__).parents[2]
# What takes longest is importing, so that one process does it and then makes the other, before anything has threads.
WORKER = f"""
import os, sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
from support.compiled_worker import main, warm_up
warm_up()
other = os.fork()
main(int(other == 0), *sys.argv[2:4])
failed = os.waitpid(other, 0)[1] if other else 0
# gloo's threads crash when Python takes them down.
os._exit(int(failed != 0))
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("compiled")
    run_processes(WORKER, folder, str(folder), processes=1)
    return json.loads((folder / "result.json").read_text())


@pytest.mark.parametrize("scheme", ["DDP", "FSDP2, compiled blocks", "FSDP2, compiled whole"])
def test_several_processes(world, scheme):
    """The losses of one process, and nothing compiled at launch; under DDP as much as the model compiles without adapters."""
    found = world[scheme]
    assert found["losses"] == pytest.approx(found["expected"], rel=1e-5)
    ours = found["adapted"]
    assert ours["before"] == ours["end"], "launch compiled something"
    assert ours["end"] == found.get("plain", ours)["end"]
    if scheme == "DDP":
        assert ours["compiled"] > ours["end"][0], "DDPOptimizer did not split the graph"
