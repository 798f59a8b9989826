"""DashLinear around layers of bitsandbytes and torchao: outputs and gradients, and the weights that the layers stand for."""

from __future__ import annotations

import copy

import loradash
import pytest
import torch
from loradash import formats, quantised
from loradash.analysis import Weights
from loradash.quantised import is_quantised, weight_of
from safetensors.torch import save_file
from support.quantised import FORMATS, K, N, adapted, case_of, check, config, results, truth
from support.quantised import quantised as layer_of
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from loradash_kernels import task_specific_directions

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# One of each kind of code, for what does not hang on details of a format.
KINDS = ("bitsandbytes-nf4-double", "bitsandbytes-int8", "torchao-int8")


@pytest.fixture(params=FORMATS)
def layer(request):
    return layer_of(request.param)


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


def not_to_be_called(*_, **__):
    raise AssertionError("called")


def test_told_apart(layer):
    assert is_quantised(layer.weight)
    assert not is_quantised(nn.Linear(4, 4).weight)
    assert not is_quantised(nn.Linear(4, 4).half().weight)
    assert not is_quantised(None)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", FORMATS)
def test_the_weight_it_stands_for(name, dtype, monkeypatch):
    """As the format defines it, without a call of the layer or products with the identity."""
    layer = layer_of(name, dtype)
    monkeypatch.setattr(type(layer), "forward", not_to_be_called)
    monkeypatch.setattr("loradash.quantised._products", not_to_be_called)
    found, wanted = weight_of(layer), truth(layer)
    assert found.shape == (N, K)
    torch.testing.assert_close(found.double(), wanted, rtol=2 * torch.finfo(found.dtype).eps, atol=1e-7)


def test_its_products_are_the_same(layer, monkeypatch):
    # The products come in several chunks, the last one smaller.
    monkeypatch.setattr("loradash.quantised.ROWS", 50)
    torch.testing.assert_close(quantised._products(layer), weight_of(layer).float(), atol=1e-6, rtol=1e-6)


WRONG = {
    "scaled": lambda weight: weight * 1.05,
    "rows": lambda weight: weight.roll(1, 0),
    "columns": lambda weight: torch.cat([weight[:, 1:], weight[:, :1]], dim=1),
    "transposed": lambda weight: weight.t().contiguous(),
    "one column": lambda weight: weight.index_fill(1, torch.tensor([K // 2]), 0),
}


@pytest.mark.parametrize(
    ("kind", "dtype", "wrong"),
    # Sums of 128 numbers in bfloat16 do not show one of them; bitsandbytes' int8 kernel sums integers.
    [
        (kind, dtype, wrong)
        for kind in KINDS
        for dtype in (torch.float32, torch.bfloat16)
        for wrong in WRONG
        if (dtype, wrong) != (torch.bfloat16, "one column") or kind == "bitsandbytes-int8"
    ],
)
def test_a_weight_that_disagrees_with_the_kernels(kind, dtype, wrong, monkeypatch):
    """Whatever a format says, the W is that of the products, as far as these are exact enough to tell."""
    # The products are those less a bias, which in 16 bits would leave little.
    layer = layer_of(kind, dtype, bias=False)
    right, make = truth(layer), type(formats.format_of(layer))
    weight = make.weight
    monkeypatch.setattr(make, "weight", lambda self, layer: WRONG[wrong](weight(self, layer)))
    rounding = max(2e-3, torch.finfo(dtype).eps)
    torch.testing.assert_close(weight_of(layer).double(), right, rtol=rounding, atol=1e-6)


@pytest.mark.parametrize("method", ["forward", "__call__"])
def test_subclasses_of_a_format(kind, method):
    """What they compute is asked of them."""
    layer = layer_of(kind)
    single = getattr(type(layer), method)
    layer.__class__ = type("Doubled", (type(layer),), {method: lambda self, x: 2 * single(self, x)})
    torch.testing.assert_close(weight_of(layer).double(), 2 * truth(layer), rtol=2e-3, atol=1e-6)


def test_a_framework_without_the_function(kind, monkeypatch):
    def missing(*_):
        raise AttributeError("no such function")

    layer = layer_of(kind)
    monkeypatch.setattr(type(formats.format_of(layer)), "weight", missing)
    torch.testing.assert_close(weight_of(layer).double(), truth(layer), rtol=2e-3, atol=1e-6)


def test_reading_leaves_the_layer_as_it_was():
    """bitsandbytes' first call settles a dtype to compute in and turns the bias to that of x."""
    bnb = pytest.importorskip("bitsandbytes")
    layer = bnb.nn.Linear4bit(K, N, quant_type="nf4").to("cpu")
    layer.bias.data = layer.bias.data.bfloat16()
    eight = layer_of("bitsandbytes-int8", torch.bfloat16)
    model = loradash.apply_dash(nn.Sequential(layer, nn.Linear(N, K), eight), config())
    for dash in model:
        nn.init.normal_(dash.lora_b)
    loradash.prelaunch(model, progress=False)
    assert layer.compute_dtype is None and not layer.compute_type_is_set
    assert layer.bias.dtype == eight.bias.dtype == torch.bfloat16
    assert eight.state.CB is None and eight.weight.CB is not None


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", FORMATS)
def test_outputs_and_gradients(name, dtype):
    layer = layer_of(name, dtype, bias=name != "torchao-int8-groups")
    case = case_of(layer, dtype, dropout_p=0.1)
    dash = adapted(layer, case)
    ours = results(dash, dash, case)
    assert ours["y"].dtype == ours["x"].dtype == dtype
    check(ours, case)
    assert all(p.grad is None and not p.requires_grad for p in layer.parameters())
    dash.enabled = False
    assert torch.equal(dash(case.x), layer(case.x))


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("name", FORMATS)
def test_wide_activations_over_a_base_of_16_bits(name, autocast):
    """Norms in float32 give float32 activations, as `prepare_model_for_kbit_training` leaves them."""
    layer = layer_of(name, torch.bfloat16)
    case = case_of(layer, torch.bfloat16)
    dash = adapted(layer, case)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        try:
            expected = layer(case.x.float())
        except RuntimeError as error:
            # Some formats take the dtype of their own scales alone, with adapters and without.
            with pytest.raises(RuntimeError, match=str(error)[:20]):
                dash(case.x.float())
            assert not autocast
            return
        ours = results(lambda x: dash(x.float()), dash, case)
    assert ours["y"].dtype == expected.dtype
    check(ours, case)


class Narrow(nn.Linear):
    """Computes and answers in float16, whatever comes."""

    def forward(self, x):
        return super().forward(x.float()).half()


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_output_of_another_dtype(dtype):
    base = Narrow(K, N)
    case = case_of(layer_of("torchao-int8"), dtype)
    dash = adapted(base, case)
    x = case.x.clone().requires_grad_()
    y = dash(x)
    assert y.dtype == base(x).dtype == torch.float16
    torch.testing.assert_close(
        y.float(), x.float() @ (base.weight + dash.delta()).t() + base.bias, rtol=1e-2, atol=5e-2
    )
    y.sum().backward()
    assert x.grad.dtype == dtype


def test_training_launch_and_files(layer, tmp_path):
    model = loradash.apply_dash(nn.Sequential(nn.Linear(K, K), layer), config())
    schedule = loradash.DashSchedule(model, progress=False)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    torch.manual_seed(1)
    x, wanted, losses = torch.randn(64, K), torch.randn(64, N), []
    for step in range(6):
        optimizer.zero_grad()
        loss = (model(x) - wanted).square().mean()
        loss.backward()
        optimizer.step()
        if step == 1:
            a, b = (t.detach().clone() for t in (model[1].lora_a, model[1].lora_b))
        schedule.step()
        losses.append(loss.item())
    dash = model[1]
    assert bool(dash.launched) and losses[-1] < losses[0] and bool(dash.dash_sigma.any())
    found = task_specific_directions(truth(layer).float(), a, b, 3, scaling=dash.scaling)
    torch.testing.assert_close(dash.dash_u, found.u, atol=2e-3, rtol=1e-2)
    loradash.save_adapter(model, tmp_path / "adapter")
    before = model.eval()(x)
    with torch.no_grad():
        dash.lora_b.zero_()
    assert not torch.equal(model(x), before)
    loradash.load_adapter(model, tmp_path / "adapter")
    torch.testing.assert_close(model(x), before)
    loradash.export_lora(model, tmp_path / "lora")


def watched(monkeypatch):
    """Notes the dequantised weights; none may be there when the next is made."""
    seen, make = [], quantised._dequantised

    def dequantise(*arguments):
        alive = sum(not reference.expired() for reference in seen)
        weight = make(*arguments)
        assert weight is not None
        seen.append(StorageWeakRef(weight.untyped_storage()))
        counts.append(alive)
        return weight

    counts = []
    monkeypatch.setattr(quantised, "_dequantised", dequantise)
    return counts


def test_one_dequantised_weight_at_a_time(tmp_path, monkeypatch):
    counts = watched(monkeypatch)
    layers = [layer_of(kind) for kind in KINDS]
    model = loradash.apply_dash(nn.Sequential(*layers), config())
    for dash in model:
        nn.init.normal_(dash.lora_b)
    again = copy.deepcopy(model)
    for layer in layers:
        monkeypatch.setattr(type(layer), "forward", not_to_be_called)
    cache = loradash.SpectralCache(tmp_path)
    assert cache.start(model).wait(600)
    # Launch finds what the thread has read, by the same fingerprints.
    monkeypatch.setattr("loradash.cache.decompose_to_keep", not_to_be_called)
    loradash.prelaunch(model, progress=False, cache=cache)
    loradash.prelaunch(again, progress=False)
    assert counts == [0] * 3 * len(layers)
    for ours, theirs in zip(model, again, strict=True):
        torch.testing.assert_close(ours.dash_u.abs(), theirs.dash_u.abs(), rtol=1e-2, atol=2e-3)


def test_quantised_since_it_was_adapted():
    torchao = pytest.importorskip("torchao.quantization")
    model = loradash.apply_dash(nn.Sequential(nn.Linear(K, N)), config())
    nn.init.normal_(model[0].lora_b)
    torchao.quantize_(model, torchao.Int8WeightOnlyConfig(version=2), filter_fn=lambda module, name: module is model[0])
    torch.testing.assert_close(model[0].weight_nk(), model[0].weight.dequantize(), rtol=0, atol=0)
    loradash.prelaunch(model, progress=False)
    assert bool(model[0].launched)
    with pytest.raises(ValueError, match="is quantised and cannot take the update"):
        model[0].merge(requantise=True)


def test_files_of_codes(tmp_path):
    """What `loradash decompose` finds in them is no weight."""
    file = tmp_path / "model.safetensors"
    stored = nn.Sequential(
        layer_of("bitsandbytes-fp4-stored-as-bfloat16"), layer_of("bitsandbytes-int8"), nn.Linear(4, 4)
    )
    state = {name: t.contiguous() for name, t in stored.state_dict().items()}
    save_file(state | {"3.weight": torch.randn(4, 4).to(torch.float8_e4m3fn)}, file)
    weights = Weights(file)
    assert torch.equal(weights.load("2.weight"), stored[2].weight)
    for name in ("0.weight", "1.weight", "3.weight"):
        with pytest.raises(
            ValueError, match=rf"{name} holds the codes of a quantised weight.*SpectralCache\(\)\.start"
        ):
            weights.load(name)


def test_a_layer_with_a_hook_of_accelerate(kind, monkeypatch):
    """The hook brings the input to where the codes are; these are read without it."""
    accelerate = pytest.importorskip("accelerate")
    layer = layer_of(kind)
    wanted = truth(layer)
    accelerate.hooks.add_hook_to_module(layer, accelerate.hooks.AlignDevicesHook(execution_device="cpu"))
    dash = loradash.DashLinear.from_linear(layer, config())
    monkeypatch.setattr("loradash.quantised._products", not_to_be_called)
    torch.testing.assert_close(dash.weight_nk().double(), wanted, rtol=1e-6, atol=1e-7)
    assert dash(torch.randn(3, K)).shape == (3, N)
