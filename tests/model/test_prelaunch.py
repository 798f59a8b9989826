"""Pre-launch of a model: all layers or none, and over processes."""

from __future__ import annotations

import loradash
import pytest
import torch
from loradash import DashConfig, DashSchedule, apply_dash
from loradash.distributed import share_out
from support.processes import run_processes
from torch import nn


def trained(steps=2, **config):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(48, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 8))
    apply_dash(model, DashConfig(r=2, directions=3, prelaunch_steps=3, **config))
    schedule = DashSchedule(model, progress=False)
    step(model, schedule, steps)
    return model, schedule


def step(model, schedule, steps):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(steps):
        model(torch.ones(4, 48)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()


def test_interrupt_leaves_pre_launch(monkeypatch):
    """Ctrl-C in the middle: no layer has launched, and the next step tries again."""
    model, schedule = trained()
    real, calls = loradash.prelaunch.__globals__["task_specific_directions"], []

    def interrupted(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setitem(loradash.prelaunch.__globals__, "task_specific_directions", interrupted)
    with pytest.raises(KeyboardInterrupt):
        step(model, schedule, 1)
    layers = loradash.dash_layers(model).values()
    assert not schedule.launched and all(layer.dash_u.abs().sum() == 0 for layer in layers)
    step(model, schedule, 1)
    assert schedule.launched and all(layer.launched for layer in layers)


def test_shares_are_even():
    costs = {f"layer {i}": float(c) for i, c in enumerate((9, 1, 1, 1, 5, 5, 2, 2, 4, 6))}
    shares = share_out(costs, 3)
    assert sorted(name for share in shares for name in share) == sorted(costs)
    assert max(sum(costs[n] for n in share) for share in shares) <= 13
    assert share_out({}, 2) == [[], []]


WORKER = """
import os, sys, torch
from torch import nn
import torch.distributed as dist
import loradash
module = sys.modules["loradash.prelaunch"]
rank, store, mode = int(sys.argv[1]), sys.argv[2], sys.argv[3]
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(48, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 8))
loradash.apply_dash(model, loradash.DashConfig(r=2, directions=3))
with torch.no_grad():
    for layer in loradash.dash_layers(model).values():
        layer.lora_b.normal_()
if mode == "plain":
    import copy
    finder = copy.deepcopy(model)
if mode == "fsdp":
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    mesh = init_device_mesh("cpu", (2,))
    for layer in loradash.dash_layers(model).values():
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
if mode == "fails" and rank == 1:
    def broken(*args, **kwargs):
        raise ValueError("the disk is on fire")
    module.task_specific_directions = broken
try:
    reports = loradash.prelaunch(model, progress=False)
except (RuntimeError, ValueError) as error:
    assert mode == "fails", error
    assert ("process 1" in str(error) and "on fire" in str(error)) if rank == 0 else "on fire" in str(error), error
    assert not any(layer.launched for layer in loradash.dash_layers(model).values())
else:
    assert mode != "fails" and len(reports) == 3
    for layer in loradash.dash_layers(model).values():
        assert bool(layer.launched)
        both = [torch.zeros_like(layer.dash_u) for _ in range(2)]
        dist.all_gather(both, layer.dash_u.contiguous())
        assert torch.equal(*both) and both[0].abs().sum() > 0
    if mode == "plain":
        dist.barrier()
        module.place = lambda group: (0, 1)
        loradash.prelaunch(finder, progress=False)
        for ours, theirs in zip(loradash.dash_layers(model).values(), loradash.dash_layers(finder).values()):
            # They were found in batches of other sizes, in which the library's sums may differ.
            assert ((ours.dash_u * theirs.dash_u).sum(0).abs() > 1 - 1e-4).all()
            assert ((ours.dash_vt * theirs.dash_vt).sum(1).abs() > 1 - 1e-4).all()
dist.barrier()
dist.destroy_process_group()
# Every assertion has passed; the interpreter's exit now and then aborts in gloo's threads ("terminate called").
os._exit(0)
"""


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["plain", "fails", "fsdp"])
def test_two_processes(tmp_path, mode):
    """Layers are shared out; both end with the directions that one process finds; a failure reaches both."""
    run_processes(WORKER, tmp_path, mode)
