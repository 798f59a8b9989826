"""Trainers of other frameworks in two gloo processes: accelerate's DistributedDataParallel, Lightning's ModelParallelStrategy."""

from __future__ import annotations

import pytest
from support.processes import run_processes

for package in ("accelerate", "peft", "lightning"):
    pytest.importorskip(package)

START = """
import contextlib, os, socket, sys, warnings
rank, store = sys.argv[1:3]
with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
os.environ |= {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "ACCELERATE_USE_CPU": "true"}
os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "NODE_RANK": "0"}
import torch
import torch.distributed as dist
from torch import nn
dist.init_process_group("gloo", init_method=f"file://{store}", rank=int(rank), world_size=2)

def end():
    print("done", flush=True)
    dist.barrier()
    # The interpreter's exit now and then aborts in gloo's threads.
    os._exit(0)
"""

ACCELERATE = """
from accelerate import Accelerator
from loradash import DashSchedule, dash_layers
from loradash.integrations.peft import DashLoraConfig, accelerated
from peft import LoraConfig, get_peft_model

def batch(step):
    return torch.randn(8, 16, generator=torch.Generator().manual_seed(step))

def adapted(config):
    torch.manual_seed(0)
    return get_peft_model(nn.Sequential(nn.Linear(16, 24), nn.Tanh(), nn.Linear(24, 16)), config)

def train(model, config, optimizer, backward, part):
    schedule = DashSchedule(model, progress=False) if isinstance(config, DashLoraConfig) else None
    for step in range(6):
        backward(model(part(batch(step))).square().mean())
        optimizer.step()
        optimizer.zero_grad()
        if schedule is not None:
            schedule.step()
    return schedule

accelerator = Accelerator(cpu=True)
assert accelerator.num_processes == 2
dash = DashLoraConfig(r=4, lora_alpha=8, directions=2, prelaunch_steps=3, target_modules=["0", "2"])
for config in (LoraConfig(r=4, lora_alpha=8, target_modules=["0", "2"]), dash):
    single = adapted(config)
    train(single, config, torch.optim.AdamW(single.parameters(), lr=1e-2), torch.Tensor.backward, lambda x: x)
    model = adapted(config)
    ours = model
    with contextlib.nullcontext() if config is dash else accelerated(model) as report:
        ddp, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=1e-2))
        assert isinstance(ddp, nn.parallel.DistributedDataParallel)
        schedule = train(ddp, config, optimizer, accelerator.backward, lambda x: x.chunk(2)[int(rank)])
    if config is dash:
        assert schedule.launched and all(layer.dash_sigma.any() for layer in dash_layers(ddp).values())
    else:
        ways = [way.how for layer in report.layers.values() for way in layer.calls]
        assert ways and set(ways) == {"fused"}, ways
    theirs = dict(single.named_parameters())
    for name, p in ours.named_parameters():
        torch.testing.assert_close(p, theirs[name], rtol=1e-4, atol=1e-5, msg=lambda text: f"{name}: {text}")
end()
"""

LIGHTNING = """
import lightning.pytorch as lightning
from lightning.pytorch.strategies import ModelParallelStrategy
from loradash import DashConfig, DashSchedule, apply_dash, dash_layers, dash_parameter_groups, dash_state, load_adapter
from loradash import save_adapter
from loradash.distributed import gathered
from loradash.integrations.lightning import DashCallback
from torch.distributed.fsdp import fully_shard

X = torch.randn(8, 8, generator=torch.Generator().manual_seed(1))

def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 8))

class Module(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = apply_dash(network(), DashConfig(r=2, directions=2, prelaunch_steps=3))

    def configure_model(self):
        mesh = self.device_mesh["data_parallel"]
        for layer in (self.net[0], self.net[2]):
            if not hasattr(layer, "unshard"):
                fully_shard(layer, mesh=mesh)
        if not hasattr(self.net, "unshard"):
            fully_shard(self.net, mesh=mesh)

    def training_step(self, x, index):
        return self.net(x[0].chunk(2)[int(rank)]).square().mean()

    def configure_optimizers(self):
        return torch.optim.AdamW(dash_parameter_groups(self, lr=1e-2))

module, callback = Module(), DashCallback(progress=False)
trainer = lightning.Trainer(
    accelerator="cpu", devices=2, num_nodes=1, strategy=ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1),
    max_steps=6, callbacks=[callback], logger=False, enable_checkpointing=False, enable_progress_bar=False,
    enable_model_summary=False, default_root_dir=os.path.dirname(store), use_distributed_sampler=False,
)
trainer.fit(module, torch.utils.data.DataLoader([X], batch_size=1))
assert callback.schedule.launched and dash_state(module).step == 6
assert all(type(layer.lora_a).__name__ == "DTensor" for layer in dash_layers(module).values())
single = apply_dash(network(), DashConfig(r=2, directions=2, prelaunch_steps=3))
optimizer, schedule = torch.optim.AdamW(dash_parameter_groups(single, lr=1e-2)), DashSchedule(single, progress=False)
for _ in range(6):
    single(X).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    schedule.step()
loaded = load_adapter(network(), save_adapter(module, f"{os.path.dirname(store)}/adapter{rank}.safetensors"))
torch.testing.assert_close(loaded(X), single(X), rtol=1e-4, atol=1e-5)
end()
"""


@pytest.mark.slow
@pytest.mark.parametrize("program", [ACCELERATE, LIGHTNING], ids=["accelerate", "lightning"])
def test_two_processes_train_as_one(tmp_path, program):
    """PEFT models accelerated and with LORADASH adapters under DDP; an apply_dash model sharded by FSDP2."""
    said = run_processes(START + program, tmp_path)
    assert all(text.strip().endswith("done") for text in said), said
