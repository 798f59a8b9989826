"""Merging into quantised layers, and what they need to be trained through: refused, or done with the error stated."""

from __future__ import annotations

import copy

import loradash
import pytest
import torch
from loradash import DashLinear
from loradash.quantised import weight_of
from support.quantised import FORMATS, K, N, case_of, check, config, eight_bit, four_bit, results, torchao, truth
from support.quantised import quantised as layer_of
from torch import nn


def adapted(layer, size=0.02):
    torch.manual_seed(3)
    model = loradash.apply_dash(nn.Sequential(layer), config())
    nn.init.normal_(model[0].lora_b, std=size)
    return model


def bits(layer):
    """Every number of a layer, codes and scales, as bytes."""
    found = []
    for tensor in layer.state_dict().values():
        parts = [tensor.qdata, tensor.scale] if hasattr(tensor, "qdata") else [tensor]
        found += [part.contiguous().flatten().view(torch.uint8).tolist() for part in parts if part.numel()]
    return found


def layout(layer):
    return {name: (type(t), t.dtype, t.shape) for name, t in layer.state_dict().items()}


@pytest.mark.parametrize("name", FORMATS)
def test_requantised_and_back(name):
    layer = layer_of(name)
    model, x = adapted(layer), torch.randn(5, K)
    dash, before, base, adapters = model[0], bits(layer), layer(x), model(x)
    original, kept = truth(layer), layout(layer)
    wanted = original + dash.delta().double()
    with pytest.raises(ValueError, match=r"0: .* is quantised and cannot take the update; merge with requantise=True"):
        loradash.merge(model)
    assert not dash.merged and bits(layer) == before
    errors = loradash.merge(model, requantise=True)
    assert list(errors) == ["0"] and dash.merged
    assert layout(layer) == kept
    # FSDP, which loses what hangs on a parameter, finds it on the layer.
    assert getattr(layer, "quant_state", None) is getattr(layer.weight, "quant_state", None)
    off = truth(layer) - wanted
    assert errors["0"].of_weight == pytest.approx(float(off.norm() / wanted.norm()), rel=1e-3)
    assert errors["0"].of_update == pytest.approx(float(off.norm() / dash.delta().double().norm()), rel=1e-3)
    # As fine as the grid of the format: what quantising the weight itself costs.
    torch.manual_seed(N + K)
    plain = nn.Linear(K, N).weight.detach().double()
    assert 0 < errors["0"].of_weight < 1.3 * float((original - plain).norm() / plain.norm())
    torch.testing.assert_close(weight_of(layer).double(), truth(layer), rtol=1e-2, atol=1e-6)
    torch.testing.assert_close(model(x), adapters, rtol=0.3, atol=0.3)
    assert torch.equal(model(x), layer(x)) and not torch.equal(model(x), base)
    assert loradash.merge(model, requantise=True) == {}
    with loradash.disable(model):
        assert torch.equal(model(x), base)
    assert dash.merged
    loradash.unmerge(model)
    assert bits(layer) == before
    assert torch.equal(layer(x), base) and torch.equal(model(x), adapters)


def test_nothing_to_merge():
    """Quantising the same weight again could change it."""
    layer = layer_of("torchao-int4")
    before = bits(layer)
    assert adapted(layer, 0.0)[0].merge(requantise=True) == (0.0, 0.0)
    assert bits(layer) == before


def test_a_plain_layer_beside_quantised_ones():
    model = loradash.apply_dash(nn.Sequential(nn.Linear(K, K), layer_of("bitsandbytes-int8")), config())
    for dash in model:
        nn.init.normal_(dash.lora_b, std=0.02)
    assert list(loradash.merge(model, requantise=True)) == ["1"]
    assert all(dash.merged for dash in model)


class Scaled(nn.Linear):
    def forward(self, x):
        return 3 * super().forward(x)


def test_all_layers_or_none():
    layer = layer_of("bitsandbytes-nf4-double")
    model = loradash.apply_dash(nn.Sequential(layer, Scaled(N, N)), config())
    for dash in model:
        nn.init.normal_(dash.lora_b, std=0.02)
    before = bits(layer)
    with pytest.raises(ValueError, match="1: Scaled computes in a way of its own and cannot take the update; serve it"):
        loradash.merge(model, requantise=True)
    assert bits(layer) == before and not any(dash.merged for dash in model)


@pytest.mark.parametrize(
    ("size", "reason"), [(1e8, "reaches .* cannot hold"), (float("nan"), "of Linear8bitLt is not finite")]
)
def test_an_update_that_the_format_cannot_hold(size, reason):
    layer = layer_of("bitsandbytes-int8")
    model, before = adapted(layer), bits(layer)
    with torch.no_grad():
        model[0].lora_b.mul_(size)
    with pytest.raises(ValueError, match=rf"0: W \+ ΔW {reason}; serve the update beside the model"):
        loradash.merge(model, requantise=True)
    assert bits(layer) == before


def test_another_adapter_into_a_merged_model(tmp_path):
    """Taken out, exchanged, merged again; a move of the model takes the codes before along."""
    layer = layer_of("bitsandbytes-int8")
    model = adapted(layer)
    before = bits(layer)
    loradash.save_adapter(model, tmp_path)
    with torch.no_grad():
        model[0].lora_b.mul_(-1)
    loradash.merge(model, requantise=True)
    loradash.load_adapter(model, tmp_path)
    assert model[0].merged
    ours = truth(layer)
    loradash.unmerge(model)
    loradash.merge(model, requantise=True)
    assert torch.equal(truth(layer), ours)
    model.half().to("cpu")
    loradash.unmerge(model)
    assert bits(layer)[:1] + bits(layer)[-2:] == before[:1] + before[-2:]


@pytest.mark.parametrize("called", [False, True])
@pytest.mark.parametrize("name", ["bitsandbytes-nf4-double", "bitsandbytes-int8", "torchao-int8"])
def test_a_merged_model_that_moves(name, called):
    """What is kept for `unmerge` goes along, wherever the first call of a layer put its scales."""
    layer, x = layer_of(name), torch.randn(3, K)
    expected = copy.deepcopy(layer)(x)
    if called:
        layer(x)
    model, before = adapted(layer), truth(layer)
    loradash.merge(model, requantise=True)
    model.to("cpu", torch.float32)
    loradash.unmerge(model)
    assert torch.equal(truth(layer), before)
    assert torch.equal(layer(x), expected)


@pytest.mark.parametrize("merged", [False, True])
def test_codes_in_a_floating_dtype_are_not_converted(merged):
    """They are bits, not numbers: in another dtype they would be another weight."""
    layer = layer_of("bitsandbytes-fp4-stored-as-bfloat16")
    model, before = adapted(layer), truth(layer)
    if merged:
        loradash.merge(model, requantise=True)
    ours = truth(layer)
    model.half().to("cpu")
    assert layer.bias.dtype == torch.float16 and torch.equal(truth(layer), ours)
    loradash.unmerge(model)
    assert torch.equal(truth(layer), before)


def test_formats_without_a_way():
    finegrained = pytest.importorskip("transformers.integrations.finegrained_fp8")
    layer = finegrained.FP8Linear(256, 128, block_size=(128, 128)).requires_grad_(False)
    layer.weight.data = torch.randn(128, 256).clamp(-3, 3).to(layer.weight.dtype)
    layer.weight_scale_inv.data = torch.tensor([[0.5, 0.25]])
    model = adapted(layer)
    wanted = layer.weight.float() * torch.tensor([0.5, 0.25]).repeat_interleave(128)
    # Its forward needs a GPU; its weight does not.
    assert torch.equal(weight_of(layer), wanted)
    loradash.prelaunch(model, progress=False)
    assert bool(model[0].launched)
    with pytest.raises(
        ValueError, match="0: transformers quantises weights to FP8 at load time alone; serve the update"
    ):
        loradash.merge(model, requantise=True)


def packing():
    bnb = pytest.importorskip("bitsandbytes")
    if not bnb.nn.modules.has_avx512bf16():
        pytest.skip("bitsandbytes repacks codes on CPUs with AVX512-BF16 alone")


@pytest.mark.parametrize("n", [90, N])
def test_training_after_an_evaluation(n):
    """On some CPUs bitsandbytes evaluates by a kernel without a gradient, for which it repacks and rounds."""
    layer = layer_of("bitsandbytes-nf4-double", n=n, bias=False)
    model, before = adapted(layer), bits(layer)
    model.eval()
    with torch.no_grad():
        model(torch.randn(3, K))
    assert bits(layer) == before
    case = case_of(layer, torch.float32)
    case.tensors |= {
        key: getattr(model[0], key).detach() for key in ("lora_a", "lora_b", "dash_u", "dash_vt", "dash_sigma")
    }
    case.tensors["weight"], case.scaling = truth(layer), model[0].scaling
    check(results(model.train(), model[0], case), case)


def test_a_layer_that_was_evaluated_before():
    packing()
    layer = layer_of("bitsandbytes-nf4-double", bias=False).eval()
    exact, x = truth(layer), torch.randn(3, K)
    with torch.no_grad():
        layer(x)
    assert layer.weight.quant_state.packing_format_for_cpu
    # Its weight is read as it lies, and the layer is as it was.
    torch.testing.assert_close(weight_of(layer).double(), exact, rtol=2e-2, atol=1e-4)
    assert layer.weight.quant_state.packing_format_for_cpu
    model = adapted(layer)
    x = x.requires_grad_()
    model(x).sum().backward()
    update = model[0].delta().double()
    torch.testing.assert_close(x.grad[0].double(), (truth(layer) + update).sum(0), rtol=1e-3, atol=1e-3)


def test_a_base_without_a_gradient():
    """Formats that round their input to int8 give none: the layers below would train on the adapters' part alone."""
    layer = torchao(nn.Linear(K, N).requires_grad_(False), lambda q: q.Int8DynamicActivationInt8WeightConfig())
    model = adapted(layer)
    x = torch.randn(3, K)
    assert model(x).requires_grad
    with pytest.raises(RuntimeError, match="0: Linear gives no gradient for its input"):
        model(x.requires_grad_())
    with torch.no_grad():
        assert model(x).isfinite().all()


def test_layers_that_are_not_ready():
    bnb = pytest.importorskip("bitsandbytes")
    plain = nn.Linear(K, N)
    for layer in (four_bit(plain, torch.float32), eight_bit(plain)):
        with pytest.raises(ValueError, match=f"{type(layer).__name__} is not quantised yet; move it to its device"):
            DashLinear.from_linear(layer, config())
    for layer in (bnb.nn.Linear4bit(K, N, device="meta"), bnb.nn.Linear8bitLt(K, N, device="meta")):
        with pytest.raises(ValueError, match=f"0: {type(layer).__name__} is quantised and on meta; load its weights"):
            loradash.apply_dash(nn.Sequential(layer), config())
    packed = pytest.importorskip("transformers.integrations.bitnet").BitLinear(K, N, False, dtype=torch.float32)
    model = nn.Sequential(nn.Linear(K, K), packed)
    with pytest.raises(ValueError, match=r"1: BitLinear rounds its input without a gradient.*autobitlinear"):
        loradash.apply_dash(model, config())
    assert type(model[0]) is nn.Linear and model[0].weight.requires_grad
    assert loradash.apply_dash(model, config(exclude_modules=["1"])) is model


@pytest.mark.parametrize("name", ["bitsandbytes-nf4", "bitsandbytes-int8", "torchao-int8"])
def test_bias_that_should_train(name):
    layer = layer_of(name)
    with pytest.raises(ValueError, match="train_bias=True: the bias of"):
        DashLinear.from_linear(layer, config(train_bias=True))
    assert copy.deepcopy(layer).bias is not None
