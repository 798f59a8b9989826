"""DistributedDataParallel in two processes, against one."""

from __future__ import annotations

import pytest
from loradash import DashConfig, apply_dash, dash_layers
from support.scale import CELLS, check
from support.schemes import network
from torch.distributed._composable.replicate import replicate


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


def test_replicated_models_are_adapted_first(process_group):
    """By torch's `replicate`, which leaves a model's class as it is, or makes it one of FSDP2's."""
    model = network()
    replicate(model)
    with pytest.raises(ValueError, match=r"wrapped in .*; apply_dash comes before it"):
        apply_dash(model, DashConfig(r=2))
    assert not dash_layers(model)
