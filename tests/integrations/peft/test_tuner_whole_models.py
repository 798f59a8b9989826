"""LORADASH adapters in whole models: targets, what trains beside, checkpointing, compiling, other wrappers."""

from __future__ import annotations

import loradash
import pytest
import torch
from torch import nn

pytest.importorskip("peft", reason="needs PEFT")
pytest.importorskip("transformers", reason="needs transformers")

from loradash.integrations.peft import DashLoraConfig
from peft import PeftModel, get_peft_model, inject_adapter_in_model
from safetensors.torch import load_file
from support.peft_models import (
    adapted,
    check_layers,
    config,
    gap,
    layers_of,
    llama,
    llama_config,
    loss_of,
    output,
    train,
    two_adapters,
)


@pytest.fixture
def both():
    return two_adapters()


def test_targets():
    model = get_peft_model(
        llama(),
        llama_config(target_modules=["q_proj", "down_proj"], layers_to_transform=[1], exclude_modules=["q_proj"]),
    )
    assert list(loradash.dash_layers(model)) == ["model.layers.1.mlp.down_proj"]
    everything = get_peft_model(llama(), llama_config())
    assert len(loradash.dash_layers(everything)) == 14


def test_what_trains_beside(tmp_path):
    settings = {"modules_to_save": ["lm_head"], "trainable_token_indices": [3, 5]}
    model = train(get_peft_model(llama(), llama_config(**settings)))
    assert gap(model.lm_head.weight, llama().lm_head.weight) > 0.01
    before = output(model)
    model.save_pretrained(tmp_path)
    assert torch.equal(output(PeftModel.from_pretrained(llama(), tmp_path)), before)
    loradash.export_lora(model, tmp_path / "plain")
    assert gap(output(PeftModel.from_pretrained(llama(), tmp_path / "plain")), before) < 1e-5
    assert gap(output(model.merge_and_unload()), before) < 1e-5


def test_checkpointing_gives_the_same_gradients():
    gradients = []
    for on in (False, True):
        model = get_peft_model(llama(), llama_config(lora_dropout=0.1))
        train(model, 2)
        model.train()
        if on:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        torch.manual_seed(5)
        loss_of(model).backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.requires_grad])
    assert all(gap(a, b) < 1e-6 for a, b in zip(*gradients, strict=True))


def test_compiled(both):
    before = output(both)
    compiled = torch.compile(both, backend="aot_eager", fullgraph=True)
    assert gap(output(compiled), before) < 1e-5


def test_a_model_without_a_peft_model_around_it():
    """transformers and diffusers have PEFT inject the layers, and keep no PeftModel."""
    model = llama()
    inject_adapter_in_model(llama_config(target_modules=["q_proj", "v_proj"]), model, "mine")
    train(model)
    assert loradash.dash_state(model).step == 3 and len(loradash.dash_layers(model)) == 4
    assert all(view.launched for view in loradash.dash_layers(model).values())
    check_layers(model, ["mine"])


def test_torch_attention_calls_its_adapted_projection():
    torch.manual_seed(0)
    block = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval()
    model = get_peft_model(nn.Sequential(block), config(target_modules=["out_proj", "linear1"]))
    x = torch.randn(2, 3, 16)
    with torch.no_grad():
        before = model(x)
        for layer in layers_of(model).values():
            layer.lora_B["default"].weight.normal_()
        assert gap(model(x), before) > 0.01


def test_ddp_sends_no_frozen_buffers(both):
    from loradash.data_parallel import frozen_buffers

    names = frozen_buffers(both)
    assert names == {n for n, _ in both.named_buffers() if ".lora_dash_" in n} and len(names) == 3 * 2 * 4


def test_presets():
    settings = DashLoraConfig.preset("commonsense-llama-7b", r=8, task_type="CAUSAL_LM", lora_dropout=0.1)
    plain = loradash.DashConfig.preset("commonsense-llama-7b", r=8)
    assert (settings.r, settings.lora_alpha, settings.lora_dropout) == (8, 16, 0.1) == (plain.r, plain.alpha, 0.1)
    assert settings.target_modules == set(plain.target_modules) and settings.task_type == "CAUSAL_LM"
    assert len(loradash.dash_layers(get_peft_model(llama(), settings))) == 2 * 5
    glue = DashLoraConfig.preset("glue-deberta-v3-base")
    assert set(glue.modules_to_save) == {"pooler", "classifier"}
    with pytest.raises(ValueError, match="no preset 'other'"):
        DashLoraConfig.preset("other")


@pytest.fixture
def one_process():
    dist = torch.distributed
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.device_mesh.init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def test_sharded_by_fsdp2(one_process, tmp_path):
    """Weights and adapters are DTensors: the same losses, the same directions, the same plain LoRA."""
    whole, model = train(adapted()), adapted()
    for layer in (*layers_of(model).values(), model):
        torch.distributed.fsdp.fully_shard(layer, mesh=one_process)
    train(model)
    assert type(loradash.dash_layers(model)["first"].lora_b).__name__ == "DTensor"
    for name, view in loradash.dash_layers(model).items():
        assert gap(view.dash_u, loradash.dash_layers(whole)[name].dash_u) < 1e-5
    ours, theirs = (load_file(loradash.export_lora(m, tmp_path) / "adapter_model.safetensors") for m in (model, whole))
    assert ours.keys() == theirs.keys() and all(gap(t, theirs[key]) < 1e-5 for key, t in ours.items())
    with pytest.raises(ValueError, match="sharded"):
        model.add_adapter("late", config())


def test_tied_weights(tmp_path):
    model = train(get_peft_model(llama(tie_word_embeddings=True), llama_config(target_modules=["q_proj", "lm_head"])))
    check_layers(model, ["default"])
    assert model.lm_head.base_layer.weight is model.get_input_embeddings().weight
    model.save_pretrained(tmp_path)
    assert torch.equal(output(PeftModel.from_pretrained(llama(tie_word_embeddings=True), tmp_path)), output(model))
