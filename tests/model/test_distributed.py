"""Distributed training: two processes of DistributedDataParallel, before and after launch."""

from __future__ import annotations

import pytest
from support.processes import run_processes

WORKER = """
import os, sys, torch, warnings
from torch import nn
import torch.distributed as dist
import loradash
rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method=f"file://{sys.argv[2]}", rank=rank, world_size=2)
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(16, 24), nn.Tanh(), nn.Linear(24, 4))
loradash.apply_dash(model, loradash.DashConfig(r=2, directions=2, prelaunch_steps=3, dropout=0.1))
# find_unused_parameters stays off: none is unused in either phase.
ddp = nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=sys.argv[3] == "view")
schedule = loradash.DashSchedule(ddp, progress=False)
optimizer = torch.optim.AdamW([p for p in ddp.parameters() if p.requires_grad], lr=1e-2)
torch.manual_seed(rank)
layers = loradash.dash_layers(model).values()
for step in range(6):
    assert schedule.launched or not any(optimizer.state[layer.dash_sigma] for layer in layers)
    optimizer.zero_grad()
    ddp(torch.randn(5, 16)).square().mean().backward()
    optimizer.step()
    schedule.step()
for name, tensor in model.state_dict().items():
    both = [torch.zeros_like(tensor.float()) for _ in range(2)]
    dist.all_gather(both, tensor.float().contiguous())
    assert torch.equal(*both), name
assert schedule.launched and all(layer.dash_sigma.abs().min() > 0 for layer in layers)
dist.barrier()
dist.destroy_process_group()
# Every assertion has passed; the interpreter's exit now and then aborts in gloo's threads ("terminate called").
os._exit(0)
"""


@pytest.mark.slow
@pytest.mark.parametrize("gradients", ["own", "view"])
def test_ddp_before_and_after_launch(tmp_path, gradients):
    """Two gloo processes: every parameter gets a gradient in both phases, and both end with equal weights."""
    run_processes(WORKER, tmp_path, gradients)
