"""What DistributedDataParallel sends with a forward pass: not the adapters' frozen buffers."""

from __future__ import annotations

import json

import pytest
from support.processes import run_processes

# Widths 48, 64, 64, 8 with s = 3: u (N, s) and vt (s, K) of three layers in float32, and a byte each.
ADAPTERS = sum(4 * 3 * (n + k) + 1 for n, k in ((64, 48), (64, 64), (8, 64)))
OTHER = 4 * 5

WORKER = """
import copy, json, os, pickle, sys, torch
from torch import nn
import torch.distributed as dist
import loradash
from loradash import data_parallel
rank, store, modes = int(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3])
dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
sent, real = [], dist._broadcast_coalesced
def counted(group, tensors, size, source):
    sent.append(sum(t.numel() * t.element_size() for t in tensors))
    return real(group, tensors, size, source)
dist._broadcast_coalesced = counted

class Counter(nn.Module):
    # A buffer that does change, as those of batch norms do.
    def __init__(self):
        super().__init__()
        self.register_buffer("count", torch.zeros(5))
    def forward(self, x):
        self.count += rank + 1
        return x

def wrapped_in(mode):
    torch.manual_seed(0)
    layers = [nn.Linear(48, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 8)]
    model = nn.Sequential(*layers, Counter()) if mode == "counter" else nn.Sequential(*layers)
    loradash.apply_dash(model, loradash.DashConfig(r=2, directions=3, prelaunch_steps=2))
    if mode == "unequal" and rank == 0:
        # As after a load_adapter in one process: wrapping gives the others what the first has.
        for layer in loradash.dash_layers(model).values():
            layer.dash_u.normal_(); layer.dash_vt.normal_(); layer.launched.fill_(True)
    if mode == "parent":
        model = nn.Sequential(model, nn.Linear(8, 8))
    if mode == "part":
        model = model[2]
    if mode == "copied":
        model = copy.deepcopy(model)
    found = data_parallel.frozen_buffers
    if mode == "untouched":
        data_parallel.frozen_buffers = lambda module: set()
    ddp = nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
    data_parallel.frozen_buffers = found
    if mode == "copied ddp":
        ddp = copy.deepcopy(ddp)
    if mode == "pickled ddp":
        ddp = pickle.loads(pickle.dumps(ddp))
    return ddp

def bytes_of(mode):
    sent.clear()
    ddp = wrapped_in(mode)
    at_wrapping, width = sum(sent), 64 if mode == "part" else 48
    sent.clear()
    parameters = [p for p in ddp.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    schedule = None if mode in ("part", "unequal") else loradash.DashSchedule(ddp, progress=False)
    torch.manual_seed(rank)
    for step in range(4):
        optimizer.zero_grad()
        ddp(torch.randn(5, width)).square().mean().backward()
        optimizer.step()
        if schedule is not None:
            schedule.step()
    forward = sum(sent) / 4
    assert schedule is None or schedule.launched
    for name, tensor in ddp.state_dict().items():
        if "count" not in name:
            both = [torch.zeros_like(tensor.float()) for _ in range(2)]
            dist.all_gather(both, tensor.float().contiguous())
            assert torch.equal(*both), name
            assert mode != "unequal" or "dash_u" not in name or both[0].abs().sum() > 0
    return {"at wrapping": at_wrapping, "forward": forward, "keys": sorted(ddp.state_dict())}

print(json.dumps({mode: bytes_of(mode) for mode in modes}))
sys.stdout.flush()
dist.barrier()
os._exit(0)
"""

MODES = ("plain", "untouched", "parent", "part", "copied", "copied ddp", "pickled ddp", "counter", "unequal")


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What both processes say of every mode."""
    folder = tmp_path_factory.mktemp("data_parallel")
    return [json.loads(said) for said in run_processes(WORKER, folder, json.dumps(MODES))]


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_bytes_of_a_forward_pass(found, mode):
    """All that changes is sent, and nothing else; all processes end with equal tensors, launched in between."""
    for said in found:
        expected = {"untouched": ADAPTERS, "counter": OTHER}.get(mode, 0)
        assert said[mode]["forward"] == expected
        # Wrapping sends everything once.
        assert said[mode]["at wrapping"] > (0 if mode == "part" else ADAPTERS)
        assert any(key.endswith("dash_u") for key in said[mode]["keys"])
