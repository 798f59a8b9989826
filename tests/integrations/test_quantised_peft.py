"""LORADASH over single quantised layers: PEFT's calls for adapters, by the error rule; merging with the error stated."""

from __future__ import annotations

import contextlib
import warnings

import loradash
import pytest
import torch
from loradash.quantised import weight_of
from support.quantised import FORMATS, K, N, case_of, check, eight_bit, four_bit, results, torchao, truth
from support.quantised import quantised as layer_of
from torch import nn

peft = pytest.importorskip("peft")
from loradash.integrations.peft import DashLoraConfig  # noqa: E402


class Model(nn.Module):
    """As transformers loads it: PEFT takes bitsandbytes' layers only in a model that says so."""

    def __init__(self, layer):
        super().__init__()
        self.lin = layer
        name = type(layer).__name__
        self.is_loaded_in_4bit, self.is_loaded_in_8bit = name == "Linear4bit", name == "Linear8bitLt"

    def forward(self, x):
        return self.lin(x)


def adapted(layer, size=0.02, **settings):
    torch.manual_seed(3)
    config = DashLoraConfig(**{"r": 4, "lora_alpha": 8, "directions": 3, "target_modules": ["lin"], **settings})
    try:
        model = peft.get_peft_model(Model(layer), config)
    except TypeError as error:
        if "get_apply_tensor_subclass" not in str(error):
            raise
        pytest.skip("this PEFT takes torchao's weights only in models that transformers quantised")
    found = model.base_model.model.lin
    nn.init.normal_(found.lora_B["default"].weight, std=size)
    return model, found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", FORMATS)
def test_outputs_and_gradients(name, dtype):
    layer = layer_of(name, dtype)
    model, ours = adapted(layer)
    case = case_of(layer, dtype)
    (view,) = loradash.dash_layers(model).values()
    for tensor in ("lora_a", "lora_b", "dash_sigma", "dash_u", "dash_vt"):
        getattr(view, tensor).data.copy_(case.tensors[tensor])
    case.scaling = ours.scaling["default"]
    check(results(model, view, case), case)
    assert all(p.grad is None for p in layer.parameters())


@pytest.mark.parametrize("name", FORMATS)
def test_merge_and_unmerge(name):
    layer = layer_of(name)
    model, ours = adapted(layer)
    x, original = torch.randn(5, K), truth(layer)
    base, before = layer(x), model(x)
    wanted = original + ours.get_delta_weight("default").double()
    off = r"1 quantised layers were quantised anew.*of the norm of W \+ ΔW, and .* of that of ΔW \(lin\)"
    with pytest.warns(UserWarning, match=off):
        model.merge_adapter()
    error = ours.requantisation
    assert error.of_weight == pytest.approx(float((truth(layer) - wanted).norm() / wanted.norm()), rel=1e-3)
    torch.testing.assert_close(model(x), before, rtol=0.3, atol=0.3)
    # A move of the model takes the codes before along; switching the adapter off takes the update out.
    model.to("cpu")
    with model.disable_adapter():
        assert torch.equal(model(x), base)
    assert torch.equal(truth(layer), original) and torch.equal(model(x), before) and ours.requantisation is None


def test_several_adapters_are_quantised_once():
    layer = layer_of("torchao-int4")
    model, ours = adapted(layer)
    model.add_adapter("other", DashLoraConfig(r=2, lora_alpha=2, directions=3, target_modules=["lin"]))
    nn.init.normal_(ours.lora_B["other"].weight, std=0.02)
    original = truth(layer)
    wanted = original + sum(ours.get_delta_weight(name).double() for name in ("default", "other"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.merge_adapter(adapter_names=["default", "other"])
    once = (truth(layer) - wanted).norm() / wanted.norm()
    assert float(once) == pytest.approx(ours.requantisation.of_weight, rel=1e-3)
    model.unmerge_adapter()
    assert torch.equal(truth(layer), original) and not ours.merged
    # One after the other, on what the first has left.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.merge_adapter(adapter_names=["default"])
        model.merge_adapter(adapter_names=["other"])
    assert ours.merged_adapters == ["default", "other"]
    model.unmerge_adapter()
    assert torch.equal(truth(layer), original) and not ours.merged


def test_a_merged_model_that_moves():
    """What is kept for `unmerge` goes along."""
    model, ours = adapted(layer_of("torchao-int8"))
    with pytest.warns(UserWarning, match="quantised anew"):
        model.merge_adapter()
    model.to("meta")
    model.unmerge_adapter()
    assert ours.base_layer.weight.qdata.is_meta and ours.base_layer.weight.is_meta


@pytest.mark.parametrize("name", ["bitsandbytes-nf4-double", "bitsandbytes-int8"])
def test_merge_and_unload(name):
    layer = layer_of(name)
    model, ours = adapted(layer, lora_bias=True)
    nn.init.normal_(ours.lora_B["default"].bias)
    wanted = truth(layer) + ours.get_delta_weight("default").double()
    bias = layer.bias + 2 * ours.lora_B["default"].bias
    with pytest.warns(UserWarning, match="quantised anew"):
        plain = model.merge_and_unload(safe_merge=True)
    assert plain.lin is layer
    assert (truth(layer) - wanted).norm() < 0.1 * wanted.norm()
    torch.testing.assert_close(layer.bias, bias)


class Scaled(nn.Linear):
    def forward(self, x):
        return 3 * super().forward(x)


def finegrained():
    layer = pytest.importorskip("transformers.integrations.finegrained_fp8").FP8Linear(K, N, block_size=(128, 128))
    layer.weight.data.copy_(torch.randn(N, K))
    layer.weight_scale_inv.data.fill_(0.5)
    try:
        # Newer ones say that its kernels are missing.
        with contextlib.suppress(ImportError):
            layer(torch.zeros(1, K))
    except AttributeError:
        # It asks PyTorch for the type of an accelerator, whether there is one or not.
        pytest.skip("the FP8 layer of the oldest transformers needs an accelerator")
    return layer.requires_grad_(False)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: Scaled(K, N), "Scaled computes in a way of its own and cannot take an update"),
        (lambda: nn.utils.parametrizations.weight_norm(nn.Linear(K, N)), "computes in a way of its own"),
        (finegrained, "FP8Linear: transformers quantises weights to FP8 at load time alone"),
    ],
)
def test_layers_that_cannot_take_an_update(make, reason):
    layer = make()
    model, _ = adapted(layer)
    weight = weight_of(layer).clone()
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match=f"lin: .*{reason}.*; serve the adapter beside the model"):
            merge()
    assert torch.equal(weight_of(layer), weight)


def test_what_is_refused_before_training():
    plain = nn.Linear(K, N).requires_grad_(False)
    for layer in (four_bit(plain, torch.float32), eight_bit(plain)):
        with pytest.raises(
            ValueError, match=f"lin .*{type(layer).__name__} is not quantised yet; move it to its device"
        ):
            adapted(layer)
    model, _ = adapted(torchao(plain, lambda q: q.Int8DynamicActivationInt8WeightConfig()))
    with pytest.raises(RuntimeError, match="Linear gives no gradient for its input"):
        model(torch.randn(3, K, requires_grad=True))
    with torch.no_grad():
        assert model(torch.randn(3, K)).isfinite().all()


def test_training_after_an_evaluation():
    """On some CPUs bitsandbytes evaluates by a kernel without a gradient, for which it repacks and rounds."""
    layer = layer_of("bitsandbytes-nf4-double", bias=False)
    model, ours = adapted(layer)
    original = truth(layer)
    with torch.no_grad():
        model.eval()(torch.randn(3, K))
    assert torch.equal(truth(layer), original)
    x = torch.randn(3, K, requires_grad=True)
    model.train()(x).sum().backward()
    update = ours.get_delta_weight("default").double()
    torch.testing.assert_close(x.grad[0].double(), (original + update).sum(0), rtol=1e-3, atol=1e-3)


def test_launch_from_the_cache(tmp_path, monkeypatch):
    """Decomposed in the background without a call of the layer, and found again at launch."""
    layer = layer_of("bitsandbytes-int8")
    model, ours = adapted(layer)
    cache = loradash.SpectralCache(tmp_path)
    called = []
    layer.register_forward_hook(lambda *_: called.append(1))
    assert cache.start(model).wait(600)
    assert not called and layer.weight.CB is not None
    monkeypatch.setattr("loradash.cache.decompose_to_keep", None)
    loradash.prelaunch(model, progress=False, cache=cache)
    assert bool(ours.lora_dash_launched["default"])
