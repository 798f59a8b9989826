"""Models that transformers loads quantised, adapted by `apply_dash` and by PEFT's LORADASH: prepared, trained, saved, run."""

from __future__ import annotations

import copy
import logging
from typing import NamedTuple

import loradash
import pytest
import torch
from loradash.quantised import weight_of
from torch import nn

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
IDS = torch.arange(24).reshape(2, 12) % 64


def four_bit():
    pytest.importorskip("bitsandbytes")
    return transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
        bnb_4bit_quant_storage=torch.bfloat16,
    )


def eight_bit():
    pytest.importorskip("bitsandbytes")
    return transformers.BitsAndBytesConfig(load_in_8bit=True)


def torchao():
    quantization = pytest.importorskip("torchao.quantization")
    return transformers.TorchAoConfig(quantization.Int8WeightOnlyConfig(version=2))


FORMATS = {"bitsandbytes-nf4": four_bit, "bitsandbytes-int8": eight_bit, "torchao-int8": torchao}


class Door(NamedTuple):
    """A way to adapt a model, with what each calls saving and loading."""

    name: str

    def adapt(self, model):
        settings = {"r": 4, "directions": 3, "prelaunch_steps": 2, "target_modules": LAYERS}
        if self.name == "apply_dash":
            return loradash.apply_dash(model, loradash.DashConfig(alpha=8, **settings))
        return peft().get_peft_model(model, dash_lora_config()(lora_alpha=8, **settings))

    def save(self, model, folder):
        if self.name == "apply_dash":
            loradash.save_adapter(model, folder)
        else:
            model.save_pretrained(folder)

    def load(self, model, folder):
        if self.name == "apply_dash":
            return loradash.load_adapter(model, folder)
        return peft().PeftModel.from_pretrained(model, folder)


def peft():
    return pytest.importorskip("peft")


def dash_lora_config():
    peft()
    from loradash.integrations.peft import DashLoraConfig

    return DashLoraConfig


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
        max_position_embeddings=64,
    )
    found = tmp_path_factory.mktemp("llama")
    transformers.LlamaForCausalLM(config).save_pretrained(found)
    return found


@pytest.fixture(autouse=True)
def quiet():
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


@pytest.fixture(params=FORMATS)
def model(request, folder):
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=FORMATS[request.param](), dtype=torch.bfloat16
    )


@pytest.fixture(params=["apply_dash", "peft"])
def door(request):
    return Door(request.param)


def train(model, steps, autocast=False):
    schedule = loradash.DashSchedule(model, progress=False)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2)
    losses = []
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return losses


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


@pytest.mark.parametrize("prepared", [True, False], ids=["prepared", "as loaded"])
def test_training_and_files(model, door, prepared, folder, tmp_path):
    """Trained through launch, loaded into a fresh model; a few tokens are generated."""
    base = copy.deepcopy(model)
    if prepared:
        prepare = peft().prepare_model_for_kbit_training
        model, base = (prepare(m, gradient_checkpointing_kwargs={"use_reentrant": False}) for m in (model, base))
    model = door.adapt(model)
    before = logits(model)
    losses = train(model, 5, autocast=prepared)
    assert losses[-1] < losses[0] - 0.1
    layers = loradash.dash_layers(model)
    assert len(layers) == 2 * len(LAYERS) and all(bool(layer.launched) for layer in layers.values())
    assert all(bool(layer.dash_sigma.any()) for layer in layers.values())
    assert all(p.dtype == torch.float32 for p in model.parameters() if p.requires_grad)
    trained = logits(model)
    assert (trained - before).abs().max() > 0.01
    tokens = model.generate(input_ids=IDS[:, :4], max_new_tokens=3, do_sample=False)
    assert tokens.shape == (2, 7)
    door.save(model, tmp_path)
    torch.testing.assert_close(logits(door.load(base, tmp_path)), trained)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(model, door, reentrant):
    """The same gradients as without, whichever way the layers are computed anew."""
    model = peft().prepare_model_for_kbit_training(model, gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model = door.adapt(model)
    for layer in loradash.dash_layers(model).values():
        nn.init.normal_(layer.lora_b, std=0.02)
    gradients = []
    for checkpointing in (True, False):
        if not checkpointing:
            model.gradient_checkpointing_disable()
        model.zero_grad()
        model.train()(input_ids=IDS, labels=IDS).loss.backward()
        gradients.append([layer.lora_a.grad.clone() for layer in loradash.dash_layers(model).values()])
    assert all(g.any() for g in gradients[0])
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-6)


def test_both_doors_read_the_same_weights(model):
    """One cache serves both: what a run through one door decomposed, the other one finds."""
    ours, theirs = (Door(name).adapt(copy.deepcopy(model)) for name in ("apply_dash", "peft"))
    weights = [[layer.weight_nk() for layer in loradash.dash_layers(m).values()] for m in (ours, theirs)]
    for one, other in zip(*weights, strict=True):
        assert torch.equal(one, other)
    names = [name for name, module in model.named_modules() if name.endswith(tuple(LAYERS))]
    for name, weight in zip(names, weights[0], strict=True):
        assert torch.equal(weight_of(model.get_submodule(name)), weight)


def test_the_dtype_that_flash_attention_asks_for(model, door):
    """Norms in float32 make float32 queries, which transformers casts to the dtype that it finds in a quantised model's
    settings: it looks for an nn.Linear in models of full precision alone, and DashLinear is none."""
    attention = pytest.importorskip("transformers.integrations.flash_attention")
    model = door.adapt(model)
    found = [module for name, module in model.named_modules() if name.endswith("self_attn")]
    assert len(found) == 2
    for module in found:
        assert attention.get_target_dtype(torch.zeros(1), module) == torch.bfloat16
        # The oldest transformers asks for CUDA's autocast alone.
        if "device_type" in attention.get_target_dtype.__code__.co_varnames:
            with torch.autocast("cpu", torch.float16):
                assert attention.get_target_dtype(torch.zeros(1), module) == torch.float16
