"""`DashCallback` under TRL's trainers, with models of both doors."""

from __future__ import annotations

import math

import pytest
import torch
from loradash import dash_layers, dash_state, load_adapter, prelaunch

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

from loradash.integrations.peft import DashLoraConfig  # noqa: E402
from loradash.integrations.transformers import DashCallback  # noqa: E402
from support.tokens import tokenizer  # noqa: E402

from benchmarks.front_ends.resume import SETTINGS, llama, own_door, peft_door  # noqa: E402

X = torch.arange(3, 15)[None]


def text(start):
    return " ".join(f"w{start + i // 2}" for i in range(12))


def arguments(kind, folder, **more):
    common = {"max_steps": 6, "save_steps": 2, "logging_steps": 1, "per_device_train_batch_size": 2, "report_to": []}
    return kind(str(folder), learning_rate=1e-2, use_cpu=True, bf16=False, disable_tqdm=True, **{**common, **more})


def fine_tuner(door, folder):
    data = datasets.Dataset.from_list([{"text": text(start)} for start in range(24)])
    config = DashLoraConfig(lora_alpha=8, directions=4, lora_dropout=0.1, task_type="CAUSAL_LM", **SETTINGS)
    return trl.SFTTrainer(
        llama() if door == "peft" else own_door(),
        arguments(trl.SFTConfig, folder, gradient_accumulation_steps=2),
        train_dataset=data,
        processing_class=tokenizer(),
        callbacks=[DashCallback(progress=False)],
        peft_config=config if door == "peft" else None,
    )


def losses(trainer, after=0):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry and entry["step"] > after]


@pytest.mark.parametrize("door", ["apply_dash", "peft"])
def test_fine_tuning(door, tmp_path):
    """It launches, logs, saves what loads into a base model, and resumes."""
    trainer = fine_tuner(door, tmp_path)
    trainer.train()
    directions = [entry["dash_directions"] for entry in trainer.state.log_history if "dash_directions" in entry]
    assert directions == [0, 0, 0, 24, 24, 24]
    trainer.save_model(str(tmp_path / "final"))
    read = peft.PeftModel.from_pretrained if door == "peft" else load_adapter
    assert torch.equal(read(llama(), str(tmp_path / "final")).eval()(X).logits, trainer.model.eval()(X).logits)
    resumed = fine_tuner(door, tmp_path)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert losses(resumed, 2) == losses(trainer, 2)
    assert dash_state(resumed.model).step == 6
    pairs = zip(dash_layers(resumed.model).values(), dash_layers(trainer.model).values(), strict=True)
    assert all(torch.equal(a.dash_sigma, b.dash_sigma) and torch.equal(a.dash_u, b.dash_u) for a, b in pairs)


def preference_trainer(model, reference, folder, **more):
    rows = [{"prompt": text(i), "chosen": " " + text(i + 6), "rejected": " " + text(30 - i)} for i in range(12)]
    return trl.DPOTrainer(
        model,
        reference,
        args=arguments(trl.DPOConfig, folder, save_steps=6),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tokenizer(),
        callbacks=[DashCallback(progress=False)],
        **more,
    )


@pytest.mark.parametrize("door", ["apply_dash", "peft"])
def test_preferences(door, tmp_path):
    """DPO: its reference is the base model, or a copy made before training."""
    config = DashLoraConfig(lora_alpha=8, directions=4, task_type="CAUSAL_LM", **SETTINGS)
    of_door = {"apply_dash": (own_door, llama, None), "peft": (llama, lambda: None, config)}
    model, reference, peft_config = of_door[door]
    trainer = preference_trainer(model(), reference(), tmp_path, peft_config=peft_config)
    trainer.train()
    assert dash_state(trainer.model).step == 6
    assert all(bool(layer.launched) and layer.dash_sigma.any() for layer in dash_layers(trainer.model).values())


def test_preferences_of_an_adapter_that_was_launched(tmp_path):
    """TRL copies its A and B to the reference. That has to be the same model: the first loss is that of equal odds."""
    model = peft_door(lora_dropout=0.0)
    for layer in dash_layers(model).values():
        torch.nn.init.normal_(layer.lora_b, std=0.1)
    prelaunch(model, progress=False)
    for layer in dash_layers(model).values():
        torch.nn.init.constant_(layer.dash_sigma, 3.0)
    plain = model.eval()(X).logits
    trainer = preference_trainer(model, None, tmp_path)
    trainer.train()
    assert losses(trainer)[0] == pytest.approx(math.log(2), abs=1e-6)
    model.set_adapter("ref")
    assert torch.equal(model.eval()(X).logits, plain)
