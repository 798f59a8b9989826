"""Experts with adapters beside PEFT: what it serves of an export, and what LORADASH in PEFT refuses; processes."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from loradash import dash_layers, dash_state, export_lora

peft = pytest.importorskip("peft")
pytest.importorskip("transformers", minversion="5")

from loradash.integrations.peft import DashLoraConfig  # noqa: E402
from support.experts import BOTH, IDS, MODELS, adapted, filled, logits, moe  # noqa: E402
from support.scale import check, run_schemes  # noqa: E402


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


SHARDED = ("train", "launch", "save", "load", "export", "merge", "resume")
WALKS = {"ddp_experts": ("train", "launch"), "fsdp1_experts": SHARDED, "fsdp2_experts": SHARDED}


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    return run_schemes(WALKS, tmp_path_factory.mktemp("experts"))


@pytest.mark.slow
@pytest.mark.parametrize(("scheme", "cell"), [(scheme, cell) for scheme, cells in WALKS.items() for cell in cells])
def test_two_processes(processes, scheme, cell):
    """As one process: DDP without find_unused_parameters, FSDP1, whose parameters are flat between uses, and FSDP2."""
    check(processes[scheme], cell)


def test_trainer_launches_and_resumes_them(tmp_path):
    from loradash.integrations.transformers import DashCallback
    from transformers import Trainer, TrainingArguments

    rows = [{"input_ids": ids, "labels": ids} for ids in IDS.repeat(8, 1)]
    found = []
    for settings, resume in (({"save_steps": 4}, None), ({"save_strategy": "no"}, str(tmp_path / "checkpoint-4"))):
        model = adapted(moe(), prelaunch_steps=3)
        options = {
            "max_steps": 6,
            "per_device_train_batch_size": 2,
            "use_cpu": True,
            "report_to": [],
            "disable_tqdm": True,
        }
        args = TrainingArguments(output_dir=str(tmp_path), logging_strategy="no", **options, **settings)
        Trainer(model, args, train_dataset=rows, callbacks=[DashCallback()]).train(resume_from_checkpoint=resume)
        assert dash_state(model).step == 6 and all(layer.launched for layer in dash_layers(model).values())
        found.append(logits(model.eval()))
    torch.testing.assert_close(*found)
