"""Adapters of models sharded by FSDP2, in two processes."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

SHARDED = """
import sys
import torch, torch.distributed as dist
from safetensors.torch import load_file
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
import loradash
from loradash import DashConfig, DashSchedule, apply_dash, export_lora, load_adapter, save_adapter

rank, folder = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
mesh = init_device_mesh("cpu", (2,))
# 3 rows over 2 processes make uneven shards.
config = DashConfig(r=3, directions=3, prelaunch_steps=2, trainable_modules=["4"], train_bias=True)

def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(7, 9), nn.Tanh(), nn.Linear(9, 7), nn.Tanh(), nn.Linear(7, 3))

def sharded(layers):
    model = apply_dash(network(), config)
    for layer in (model[0], model[2], model[4]) if layers else ():
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)

x = torch.randn(6, 7, generator=torch.Generator().manual_seed(1))
# Where only the root is sharded, a forward pass leaves its parameters gathered.
for layers in (True, False):
    model = sharded(layers)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2)
    schedule = DashSchedule(model, progress=False)
    for _ in range(4):
        model(x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    with torch.no_grad():
        y = model(x)
    mine = save_adapter(model, f"{folder}/{layers}{rank}.safetensors")
    common = save_adapter(model, f"{folder}/{layers}.safetensors")
    dist.barrier()
    files = [f"{folder}/{layers}{name}.safetensors" for name in ("0", "1", "")]
    written = [load_file(f) for f in files]
    assert all(torch.equal(t, other[k]) for other in written for k, t in written[0].items()), "files differ"
    plain = load_adapter(network(), mine)
    torch.testing.assert_close(plain(x), y, rtol=1e-5, atol=1e-5)
    again = sharded(layers)
    with torch.no_grad():
        again(x)
    load_adapter(again, common)
    assert type(again[0].lora_a).__name__ == "DTensor"
    with torch.no_grad():
        torch.testing.assert_close(again(x), y, rtol=1e-5, atol=1e-5)
    loradash.merge(again)
    with torch.no_grad():
        torch.testing.assert_close(again(x), y, rtol=1e-5, atol=1e-5)
    assert not again[0].weight.requires_grad
    loradash.unmerge(again)
    with loradash.disable(again), torch.no_grad():
        off = again(x)
    with loradash.disable(plain), torch.no_grad():
        torch.testing.assert_close(off, plain(x), rtol=1e-5, atol=1e-5)
    loradash.dash_state(again).config = loradash.dash_state(plain).config = DashConfig(
        **{**config.to_dict(), "train_bias": False}
    )
    export_lora(again, f"{folder}/sharded{layers}{rank}")
    export_lora(plain, f"{folder}/plain{layers}{rank}")
    one, two = (load_file(f"{folder}/{k}{layers}{rank}/adapter_model.safetensors") for k in ("sharded", "plain"))
    assert one.keys() == two.keys() and all(torch.equal(t, two[k]) for k, t in one.items())
print("done")
sys.stdout.flush()
dist.barrier()
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_sharded_models_save_load_merge_and_export(tmp_path):
    """FSDP2 in two processes: files have whole tensors, each process takes its shards back."""
    pytest.importorskip("torch.distributed.fsdp")
    (tmp_path / "script.py").write_text(SHARDED)
    processes = [
        subprocess.Popen(
            [sys.executable, str(tmp_path / "script.py"), str(rank), str(tmp_path)],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        outputs = [p.communicate(timeout=600)[0] for p in processes]
    finally:
        for p in processes:
            p.kill()
    assert all(p.returncode == 0 and "done" in text for p, text in zip(processes, outputs, strict=True)), outputs
