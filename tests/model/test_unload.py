"""merge_and_unload: the merged outputs, and nothing of ours left in the model."""

from __future__ import annotations

import copy
import gc
import pickle
import re
import weakref

import loradash
import pytest
import torch
from loradash import (
    DashConfig,
    DashLinear,
    apply_dash,
    dash_layers,
    load_adapter,
    merge,
    merge_and_unload,
    save_adapter,
)
from support import layers as kinds
from support.networks import CONFIG, X, network
from support.networks import trained as trained_network
from torch import nn
from torch.distributed.fsdp import fully_shard

WIDTH = kinds.WIDTH


def adapted(model, **settings):
    """Launched, with an update in every term."""
    apply_dash(model, DashConfig(**{"r": 2, "directions": 2, **settings}))
    generator = torch.Generator().manual_seed(0)
    for layer in dash_layers(model).values():
        for tensor in (layer.lora_a, layer.lora_b, layer.dash_sigma, layer.dash_u, layer.dash_vt):
            with torch.no_grad():
                tensor.copy_(torch.randn(tensor.shape, generator=generator) / 8)
        layer.launched.fill_(True)
    return model.eval()


def facts(model):
    """What a model is made of: classes, keys, attributes, what trains."""
    return {
        "classes": [(name, type(m)) for name, m in model.named_modules()],
        "keys": list(model.state_dict()),
        "attributes": {name: set(vars(m)) for name, m in model.named_modules()},
        "trains": [(name, p.requires_grad) for name, p in model.named_parameters()],
        "flags": {
            (name, flag): getattr(m, flag)
            for name, m in model.named_modules()
            for flag in ("activation_relu_or_gelu", "use_nested_tensor", "enable_nested_tensor", "in_features", "nf")
            if hasattr(m, flag)
        },
    }


def check(make, *inputs, tolerance=1e-5, **settings):
    torch.manual_seed(0)
    model = make()
    before = facts(model)
    adapted(model, **settings)
    merged = merge_of(model)
    with torch.no_grad():
        expected = merged(*inputs)
    assert merge_and_unload(model) is model
    assert facts(model) == before
    with torch.no_grad():
        found = model(*inputs)
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    return model


def merge_of(model):
    merged = copy.deepcopy(model)
    merge(merged)
    return merged


@pytest.mark.parametrize("name", [name for name, (_, treatment) in kinds.LAYERS.items() if treatment != "refused"])
def test_every_kind_of_layer(name):
    """Where `merge` takes the update, the same outputs from the layer that was there; elsewhere its error, and no change."""
    make, treatment = kinds.LAYERS[name]

    def model():
        torch.manual_seed(0)
        return nn.Sequential(make())

    try:
        merge(expected := adapted(model()))
    except ValueError as error:
        refused(adapted(model()), re.escape(str(error)))
        return
    ours, x = model(), torch.randn(3, WIDTH)
    layer, before = ours[0], facts(ours)
    merge_and_unload(adapted(ours))
    assert facts(ours) == before
    assert (ours[0] is layer) == (treatment == "kept whole")
    assert torch.equal(ours(x), expected(x))


@pytest.mark.parametrize("relu", [True, False])
def test_attention(relu):
    """The classes and flags that torch's fused path goes by; with these it runs again."""

    def make():
        layer = nn.TransformerEncoderLayer(WIDTH, 4, 48, batch_first=True, activation="relu" if relu else "gelu")
        return nn.TransformerEncoder(layer, 2).eval()

    check(make, torch.randn(2, 5, WIDTH))


def test_transformers_model(tmp_path):
    """With a head tied to the embedding, which is left out; from_pretrained reads what save_pretrained writes."""
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=32, n_positions=16, n_embd=WIDTH, n_layer=2, n_head=4)

    class Logits(nn.Module):
        def __init__(self):
            super().__init__()
            self.lm = transformers.GPT2LMHeadModel(config)

        def forward(self, tokens):
            return self.lm(tokens).logits

    model = check(Logits, torch.arange(8)[None], target_modules=["c_attn", "c_proj", "c_fc"])
    assert model.lm.lm_head.weight is model.lm.transformer.wte.weight
    model.lm.save_pretrained(tmp_path)
    read, tokens = transformers.GPT2LMHeadModel.from_pretrained(tmp_path).eval(), torch.arange(8)[None]
    assert torch.equal(read(tokens).logits, model(tokens))


def test_what_trained_before_trains_again():
    model = network()
    model[2].weight.requires_grad_(False)
    expected = {name: p.requires_grad for name, p in model.named_parameters()}
    merge_and_unload(apply_dash(model, CONFIG))
    assert {name: p.requires_grad for name, p in model.named_parameters()} == expected


def test_after_training_and_from_a_file(tmp_path):
    model = trained_network().eval()
    save_adapter(model, tmp_path)
    with torch.no_grad():
        expected = merge_of(model)(X)
        unloaded = merge_and_unload(load_adapter(network(), tmp_path)).eval()
        assert torch.equal(unloaded(X), expected)
        assert list(unloaded.state_dict()) == list(network().state_dict())
        plain = network()
        plain.load_state_dict(unloaded.state_dict())
        assert torch.equal(plain(X), expected)
        # It is an ordinary model: adapted anew, pickled.
        apply_dash(pickle.loads(pickle.dumps(unloaded)), CONFIG)


def test_a_merged_model():
    model = adapted(network())
    expected = merge_of(model)(X)
    merge(model)
    assert torch.equal(merge_and_unload(model)(X), expected)


def test_nothing_keeps_the_adapters_alive():
    model = adapted(network())
    tensors = [weakref.ref(t) for layer in dash_layers(model).values() for t in (layer.lora_a, layer.weight)]
    merge_and_unload(model)
    gc.collect()
    assert not any(t() for t in tensors)


@pytest.mark.parametrize("make", [kinds.linear, kinds.hooked])
def test_hooks_go_along(make):
    model, seen = adapted(nn.Sequential(make())), []
    handle = model[0].register_forward_hook(lambda module, args, output: seen.append(type(module)))
    model[0].register_forward_pre_hook(lambda module, args, kwargs: seen.append("pre"), with_kwargs=True)
    merge_and_unload(model)
    model(torch.randn(1, WIDTH))
    assert seen == ["pre", nn.Linear]
    if make is kinds.linear:
        handle.remove()
        assert not model[0]._forward_hooks


def test_a_layer_that_occurs_twice():
    shared = nn.Linear(WIDTH, WIDTH)
    model = check(lambda: nn.Sequential(shared, nn.Tanh(), shared), torch.randn(2, WIDTH))
    assert model[0] is model[2]


def test_one_layer_alone():
    layer, x = DashLinear(6, 4, config=DashConfig(r=2, directions=2)), torch.randn(3, 6)
    nn.init.normal_(layer.lora_b)
    expected = layer(x)
    plain = merge_and_unload(layer)
    assert type(plain) is nn.Linear
    torch.testing.assert_close(plain(x), expected)


def test_a_compiled_model():
    model = torch.compile(network(), backend="eager")
    adapted(model)
    expected = model(X)
    assert merge_and_unload(model) is model
    torch.testing.assert_close(model(X), expected, rtol=1e-4, atol=1e-4)


def refused(model, match, error=ValueError):
    """The error, with the model unchanged."""
    before = {name: (type(m), dict(vars(m))) for name, m in model.named_modules()}
    state = {k: v.clone() for k, v in model.state_dict().items() if type(v) is torch.Tensor and not v.is_meta}
    with pytest.raises(error, match=match):
        merge_and_unload(model)
    assert before == {name: (type(m), dict(vars(m))) for name, m in model.named_modules()}
    assert all(torch.equal(model.state_dict()[key], value) for key, value in state.items())


def test_ties():
    """An embedding with the head's weight has no place for the update; without an update, or untied, there is no question."""

    def tied():
        model = nn.ModuleDict({"embedding": nn.Embedding(9, WIDTH), "head": nn.Linear(WIDTH, 9, bias=False)})
        model["head"].weight = model["embedding"].weight
        return model

    model = adapted(tied())
    refused(model, "head: its weight is tied to that of embedding, where the update has no place")
    merge(model)
    with pytest.raises(ValueError, match="head: its weight is tied to that of embedding"):
        merge_and_unload(model)
    loradash.unmerge(model)
    model["head"].weight = nn.Parameter(model["head"].weight.detach().clone())
    merge_and_unload(model)
    assert not torch.equal(model["head"].weight, model["embedding"].weight)
    model = apply_dash(tied(), DashConfig(r=2))
    merge_and_unload(model)
    assert model["head"].weight is model["embedding"].weight and model["head"].weight.requires_grad


@pytest.mark.parametrize("bad", [0, 1])
def test_all_layers_or_none(bad):
    model = adapted(nn.Sequential(kinds.linear().half(), kinds.linear().half()))
    for tensor in (model[bad].lora_a, model[bad].lora_b):
        nn.init.constant_(tensor, 300.0)
    refused(model, rf"{bad}: the merged weight reaches .* not finite in torch.float16")


def test_layers_that_cannot_take_the_update():
    refused(
        adapted(nn.Sequential(kinds.linear(), kinds.Scaled(WIDTH, WIDTH))), "1: Scaled computes in a way of its own"
    )
    pytest.importorskip("torchao")
    refused(
        adapted(nn.Sequential(kinds.linear(), kinds.in_format("torchao-int8"))),
        "1: Linear is quantised and cannot take the update",
    )
    with torch.device("meta"):
        model = apply_dash(network(), CONFIG)
    with pytest.raises(ValueError, match="0: its weight is on meta"):
        merge_and_unload(model)


def test_wrapped_and_patched_models():
    refused(nn.DataParallel(adapted(network())), "the model is wrapped in DataParallel; pass the model inside it")
    model = adapted(network())
    model[0].forward = model[0].forward
    refused(model, "0: its forward was replaced since it was adapted")


def test_models_without_adapters():
    refused(network(), "no LoRA-Dash adapters; there is nothing to merge")


def test_sharded_models(tmp_path, process_group):
    """Refused, and the way that the error tells."""
    model = fully_shard(apply_dash(network(), CONFIG), mesh=process_group)
    nn.init.normal_(model[0].lora_b)
    with pytest.raises(
        ValueError,
        match=r"the model is wrapped in fully_shard .*, then merge_and_unload\(load_adapter\(plain_model, path\)\)",
    ):
        merge_and_unload(model)
    save_adapter(model, tmp_path)
    plain = merge_and_unload(load_adapter(network(), tmp_path))
    torch.testing.assert_close(plain(X), model(X))


def test_requantised_layers():
    pytest.importorskip("torchao")
    model = adapted(nn.Sequential(kinds.linear(), kinds.in_format("torchao-int8")))
    quantised, x = model[1].base, torch.randn(3, WIDTH)
    errors = merge(model, requantise=True)
    expected = model(x)
    assert list(errors) == ["1"] and merge_and_unload(model)[1] is quantised
    assert torch.equal(model(x), expected)


def test_layers_without_an_update_need_no_room_for_one():
    base = kinds.Scaled(WIDTH, WIDTH)
    assert merge_and_unload(apply_dash(nn.Sequential(base), DashConfig(r=2)))[0] is base


def test_peft_models_have_their_own():
    peft = pytest.importorskip("peft")
    from loradash.integrations.peft import DashLoraConfig

    model = peft.get_peft_model(network(), DashLoraConfig(r=2, directions=2, target_modules=["0"]))
    refused(model, r"the adapters of this model are PEFT's; call model.merge_and_unload\(\)", TypeError)
