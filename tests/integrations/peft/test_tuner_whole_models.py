"""LORADASH adapters in whole models: targets, what trains beside, checkpointing, compiling, other wrappers."""

from __future__ import annotations

import loradash
import pytest
import torch
from torch import nn

pytest.importorskip("peft", reason="needs PEFT")
pytest.importorskip("transformers", reason="needs transformers")

from peft import get_peft_model, inject_adapter_in_model
from support.peft_models import (
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
    from peft import PeftModel

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
