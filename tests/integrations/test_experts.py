"""Experts with adapters beside PEFT: what it serves of an export, and what LORADASH in PEFT refuses; processes."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from loradash import export_lora

peft = pytest.importorskip("peft")
pytest.importorskip("transformers", minversion="5")

from loradash.integrations.peft import DashLoraConfig  # noqa: E402
from support.experts import BOTH, MODELS, adapted, filled, logits, moe  # noqa: E402
from support.processes import run_processes  # noqa: E402

TESTS = str(Path(__file__).parents[1])


@pytest.mark.parametrize("kind", MODELS)
def test_peft_serves_an_export(kind, tmp_path):
    """One parameter or the other, or both with a linear layer of another rank; PEFT takes experts without dropout alone."""
    base = moe(kind)
    linear = "kv_b_proj" if kind == "DeepseekV3" else "q_proj"
    for i, settings in enumerate(
        (
            {"target_parameters": BOTH[:1]},
            {"target_parameters": BOTH[1:], "use_rslora": True},
            {
                "target_modules": [linear],
                "dropout": 0.2,
                "overrides": {linear: {"r": 5}, "down_proj": {"directions": 0}},
            },
        )
    ):
        model = filled(adapted(copy.deepcopy(base), **settings))
        folder = export_lora(model, tmp_path / str(i))
        served = peft.PeftModel.from_pretrained(copy.deepcopy(base), str(folder)).eval()
        torch.testing.assert_close(logits(served), logits(model), rtol=1e-4, atol=1e-4)
        assert (logits(served) - logits(base)).abs().max() > 0.1
    settings = json.loads((folder / "adapter_config.json").read_text())
    assert settings["lora_dropout"] == 0.0 and len(settings["target_parameters"]) == 2 and settings["r"] == 7


def test_what_cannot_be_exported(tmp_path):
    one = filled(adapted(moe("GptOss", num_local_experts=1, num_experts_per_tok=1)))
    with pytest.raises(ValueError, match="one expert, stored as"):
        export_lora(one, tmp_path)
    shared = filled(adapted(moe()))
    shared.other = shared.model.layers[0].mlp.experts
    with pytest.raises(ValueError, match="one shared module"):
        export_lora(shared, tmp_path)
    assert not any(tmp_path.iterdir())


def test_loradash_in_peft_adapts_no_experts():
    base = moe()
    for targets in (["q_proj", "w1", "w3"], ["gate_up_proj"], ["q_proj", "experts.down_proj"]):
        with pytest.raises(ValueError, match=r"match no layer: the experts of this model are parameters .*apply_dash"):
            peft.get_peft_model(copy.deepcopy(base), DashLoraConfig(target_modules=targets))
    with pytest.raises(ValueError, match="target_parameters"):
        peft.get_peft_model(copy.deepcopy(base), DashLoraConfig(target_modules=["q_proj"], target_parameters=BOTH))
    with pytest.warns(UserWarning, match="all-linear leaves the experts out"):
        peft.get_peft_model(copy.deepcopy(base), DashLoraConfig(target_modules="all-linear"))


WORKER = """
import json, os, sys, torch
import torch.distributed as dist
sys.path.insert(0, sys.argv[4])
from support.experts import IDS, adapted, loss_of, moe
import loradash
from loradash import DashSchedule, dash_layers, load_adapter, merge, save_adapter, unmerge
rank, store, folder = int(sys.argv[1]), sys.argv[2], sys.argv[3]
dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

def run(scheme):
    torch.manual_seed(0)
    model = adapted(moe()).train()
    wrapped = model
    if scheme == "ddp":
        # Nothing is ever unused: all experts of a parameter are one node, the idle ones' gradients are zeros.
        wrapped = torch.nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
    if scheme == "fsdp2":
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    schedule, losses = DashSchedule(wrapped, progress=False), []
    for _ in range(4):
        ids = IDS if scheme == "one" else IDS[rank : rank + 1]
        loss = loss_of(wrapped, ids)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        loss = loss.detach()
        if scheme != "one":
            dist.all_reduce(loss)
            loss /= 2
        losses.append(loss.item())
    assert schedule.launched
    path = f"{folder}/{scheme}.safetensors"
    save_adapter(wrapped, path)
    model.eval()
    with torch.no_grad():
        found = wrapped(input_ids=IDS).logits
        merge(wrapped)
        gap = (wrapped(input_ids=IDS).logits - found).abs().max().item()
        unmerge(wrapped)
        assert torch.equal(wrapped(input_ids=IDS).logits, found)
    plain = load_adapter(moe(), path).eval()
    with torch.no_grad():
        loaded = (plain(input_ids=IDS).logits - found).abs().max().item()
    return losses, gap, loaded, found.tolist()

mesh = init_device_mesh("cpu", (2,))
print(json.dumps({scheme: run(scheme) for scheme in ("one", "ddp", "fsdp2")}), flush=True)
dist.barrier()
os._exit(0)
"""


def test_two_processes(tmp_path):
    """DDP without find_unused_parameters, and FSDP2, train, launch, save and merge as one process does."""
    said = json.loads(run_processes(WORKER, tmp_path, str(tmp_path), TESTS)[0].splitlines()[-1])
    alone, _, _, wanted = said["one"]
    for scheme in ("ddp", "fsdp2"):
        losses, merged, loaded, found = said[scheme]
        assert losses == pytest.approx(alone, abs=1e-5), scheme
        assert merged < 1e-4 and loaded < 1e-5
        torch.testing.assert_close(torch.tensor(found), torch.tensor(wanted), rtol=1e-3, atol=1e-3)
