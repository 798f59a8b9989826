"""DistributedDataParallel in two processes, against one."""

from __future__ import annotations

import pytest
from support.scale import CELLS, check


@pytest.mark.slow
@pytest.mark.parametrize("cell", [*CELLS, "cache", "traffic"])
def test_ddp(two, cell):
    """A step sends the gradients of what trains, and nothing else (traffic)."""
    check(two[1]["ddp"], cell)


@pytest.mark.slow
@pytest.mark.parametrize("cell", ["train", "launch"])
@pytest.mark.parametrize("option", ["static", "view", "unused", "no_sync"])
def test_its_options(two, option, cell):
    """static_graph, gradient_as_bucket_view, find_unused_parameters, and accumulation under no_sync."""
    check(two[1][f"ddp_{option}"], cell)
