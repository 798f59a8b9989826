"""FSDP2 in two processes, against one."""

from __future__ import annotations

import loradash
import pytest
import torch
from loradash import DashConfig, apply_dash, load_adapter, merge_and_unload, save_adapter
from support.scale import CELLS, check
from support.schemes import network
from torch.distributed.fsdp import fully_shard


@pytest.mark.slow
@pytest.mark.parametrize("cell", [*CELLS, "cache", "traffic"])
def test_fsdp2(two, cell):
    """A step gathers as often as the frozen model's, and reduces the gradients of what trains (traffic)."""
    check(two[1]["fsdp2"], cell)


@pytest.mark.slow
@pytest.mark.parametrize("cell", ["train", "launch"])
@pytest.mark.parametrize(
    "option", ["layers", "kept", "bf16", "half", "offloaded", "not_offloaded", "checkpointed", "wrapped"]
)
def test_its_options(two, option, cell):
    check(two[1][f"fsdp2_{option}"], cell)


@pytest.mark.slow
@pytest.mark.parametrize("cell", [cell for cell in CELLS if cell != "export"])
def test_a_root_that_stays_gathered(two, cell):
    check(two[1]["fsdp2_root"], cell)


@pytest.mark.slow
@pytest.mark.parametrize("cell", ["train", "launch", "save", "load", "resume"])
def test_layers_kept_whole(two, cell):
    """Pre-launch asks the layer itself for its products, with its weight gathered."""
    check(two[1]["fsdp2_kept_whole"], cell)


@pytest.mark.parametrize("ran", [False, True], ids=["new", "after a forward pass"])
@pytest.mark.parametrize("whole", [True, False], ids=["root", "block"])
def test_sharding_comes_after_adapting(process_group, whole, ran):
    """After a forward pass the root's parameters are plain tensors, whose memory FSDP2 will free."""
    model = network()
    fully_shard(model if whole else model.blocks[0], mesh=process_group)
    if ran:
        model(torch.zeros(1, 24))
    with pytest.raises(ValueError, match=r"wrapped in fully_shard \(FSDP\w+\); apply_dash comes before it"):
        apply_dash(model, DashConfig(r=2))
    assert not loradash.dash_layers(model)


@pytest.mark.parametrize("ran", [False, True], ids=["new", "after a forward pass"])
def test_sharded_models_are_not_unloaded(process_group, tmp_path, ran):
    model = fully_shard(apply_dash(network(), DashConfig(r=2)), mesh=process_group)
    if ran:
        model(torch.zeros(1, 24))
    with pytest.raises(ValueError, match=r"the model is wrapped in fully_shard .*load_adapter\(plain_model"):
        merge_and_unload(model)
    assert len(loradash.dash_layers(model)) == 5
    merge_and_unload(load_adapter(network(), save_adapter(model, tmp_path)))


@pytest.mark.parametrize("ran", [False, True], ids=["new", "after a forward pass"])
def test_layers_kept_whole_are_not_merged(process_group, ran):
    """What is written to a gathered weight would be lost with it."""
    model = network()
    model.blocks[0].up.register_forward_hook(lambda *_: None)
    fully_shard(apply_dash(model, DashConfig(r=2)), mesh=process_group)
    if ran:
        model(torch.zeros(1, 24))
    with pytest.raises(ValueError, match=r"blocks\.0\.up: Linear is kept whole, and sharded"):
        loradash.merge(model)
    assert not any(layer.merged for layer in loradash.dash_layers(model).values())
