"""Quantised models under Trainer and TRL: as PeftModels, or refused with the way in."""

from __future__ import annotations

import pytest
import torch
from loradash import DashConfig, apply_dash, dash_layers, dash_state

transformers = pytest.importorskip("transformers")
pytest.importorskip("bitsandbytes")
pytest.importorskip("accelerate")
peft = pytest.importorskip("peft")
trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")

from loradash.integrations.peft import DashLoraConfig  # noqa: E402
from loradash.integrations.transformers import DashCallback  # noqa: E402
from support.tokens import tokenizer  # noqa: E402

from benchmarks.front_ends.resume import SETTINGS, llama, rows  # noqa: E402


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    llama(hidden_size=64, intermediate_size=128).save_pretrained(folder)
    return folder


def four_bit(folder):
    config = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    try:
        return transformers.AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)
    # Versions before 4.50 or so want Intel's extension, and fall over saying it.
    except AttributeError as error:
        pytest.skip(f"transformers {transformers.__version__} does not load four bits on a CPU ({error})")


def test_apply_dash_under_trainer(folder, tmp_path):
    """The callback is made before the trainer, whose own refusal does not say what to do."""
    model = apply_dash(four_bit(folder), DashConfig(**SETTINGS))
    args = transformers.TrainingArguments(str(tmp_path), report_to=[], use_cpu=True)
    with pytest.raises(ValueError, match=r"only as a PeftModel: instead of apply_dash call get_peft_model"):
        transformers.Trainer(model, args, train_dataset=rows(), callbacks=[DashCallback(model)])


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_peft_model_under_trl(folder, tmp_path):
    """TRL casts all that trains to bfloat16; Δσ, whose small steps would be lost, is taken back."""
    config = DashLoraConfig(lora_alpha=8, directions=4, task_type="CAUSAL_LM", **SETTINGS)
    common = {"max_steps": 6, "report_to": [], "use_cpu": True, "bf16": False, "disable_tqdm": True, "save_steps": 6}
    trainer = trl.SFTTrainer(
        four_bit(folder),
        trl.SFTConfig(str(tmp_path), learning_rate=1e-2, **common),
        train_dataset=datasets.Dataset.from_list([{"input_ids": row["input_ids"]} for row in rows()]),
        processing_class=tokenizer(),
        callbacks=[DashCallback(progress=False)],
        peft_config=config,
    )
    layers = dash_layers(trainer.model).values()
    assert {(layer.lora_a.dtype, layer.dash_sigma.dtype) for layer in layers} == {(torch.bfloat16, torch.float32)}
    trainer.train()
    assert dash_state(trainer.model).step == 6
    assert all(bool(layer.launched) and layer.dash_sigma.any() for layer in layers)
    assert {layer.dash_sigma.dtype for layer in layers} == {torch.float32}
