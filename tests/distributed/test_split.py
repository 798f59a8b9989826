"""Fused projections with adapters for their parts, wrapped and sharded: losses, launch and files as without."""

from __future__ import annotations

import pytest
import torch
from loradash import (
    DashConfig,
    DashSchedule,
    apply_dash,
    dash_layers,
    load_adapter,
    merge,
    save_adapter,
    split_projections,
)
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard


def base():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Sequential(nn.Linear(16, 24), nn.Linear(24, 4)))
    split_projections(model, {"0.0": {"q": 12, "k": 6, "v": 6}})
    return model


def adapted():
    return apply_dash(base(), DashConfig(r=3, directions=2, target_modules=["q", "v"], prelaunch_steps=2))


def train(model):
    schedule = DashSchedule(model, progress=False)
    optimizer, losses = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.3), []
    for number in range(4):
        x = torch.randn(4, 16, generator=torch.Generator().manual_seed(number))
        loss = (model(x) - 1).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(loss.detach())
    return torch.stack(losses)


def sharded(mesh, part):
    model = adapted()
    fully_shard(part(model), mesh=mesh)
    return fully_shard(model, mesh=mesh)


WAYS = {
    "DDP": lambda mesh: nn.parallel.DistributedDataParallel(adapted()),
    "FSDP2 by block": lambda mesh: sharded(mesh, lambda model: model[0]),
    "FSDP2 by layer": lambda mesh: sharded(mesh, lambda model: model[0][0]),
    "FSDP2 by part": lambda mesh: sharded(mesh, lambda model: model[0][0].q),
    "FSDP1": lambda mesh: FullyShardedDataParallel(adapted(), use_orig_params=True, device_id=torch.device("cpu")),
}


@pytest.mark.filterwarnings("ignore:FSDP is switching to use `NO_SHARD`")
@pytest.mark.parametrize("way", WAYS)
def test_as_without(way, process_group, tmp_path):
    """Merges of sharded weights are refused; the way that the error tells works."""
    model, x = WAYS[way](process_group), torch.ones(2, 16)
    torch.testing.assert_close(train(model), train(adapted()))
    assert all(bool(layer.launched) for layer in dash_layers(model).values()) and len(dash_layers(model)) == 2
    again = load_adapter(base(), save_adapter(model, tmp_path))
    with torch.no_grad():
        y = model(x)
        torch.testing.assert_close(again(x), y)
        if way == "DDP":
            merge(model)
        else:
            with pytest.raises(ValueError, match=r"then merge\(load_adapter\(plain_model, path\)\)"):
                merge(model)
        merge(again)
        torch.testing.assert_close(model(x), y)
        torch.testing.assert_close(again(x), y)
