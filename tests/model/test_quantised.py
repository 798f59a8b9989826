"""DashLinear around layers of bitsandbytes and torchao: outputs, gradients, and pre-launch on the weights they stand for."""

from __future__ import annotations

import loradash
import pytest
import torch
from loradash.quantised import is_quantised, weight_of
from torch import nn
from torch.nn import functional as F

from loradash_kernels import task_specific_directions

K, N = 128, 96


def plain(bias=True):
    torch.manual_seed(0)
    return nn.Linear(K, N, bias)


def four_bit():
    bnb = pytest.importorskip("bitsandbytes")
    layer = bnb.nn.Linear4bit(K, N, compute_dtype=torch.float32, quant_type="nf4")
    layer.load_state_dict(plain().state_dict())
    return layer.to("cpu"), lambda q: bnb.functional.dequantize_4bit(q.weight.data, q.weight.quant_state)


def eight_bit():
    torchao = pytest.importorskip("torchao.quantization")
    model = nn.Sequential(plain())
    torchao.quantize_(model, torchao.Int8WeightOnlyConfig())
    return model[0], lambda q: q.weight.dequantize()


@pytest.fixture(params=[four_bit, eight_bit], ids=["bitsandbytes-nf4", "torchao-int8"])
def quantised(request):
    return request.param()


def config(**options):
    return loradash.DashConfig(r=4, directions=3, prelaunch_steps=2, dropout=0.0, **options)


def test_told_apart(quantised):
    assert is_quantised(quantised[0].weight)
    assert not is_quantised(plain().weight)
    assert not is_quantised(plain().half().weight)
    assert not is_quantised(None)


def test_the_weight_it_stands_for(quantised, monkeypatch):
    layer, truth = quantised
    # The products come in several chunks, the last one smaller.
    monkeypatch.setattr("loradash.quantised.ROWS", 50)
    found = weight_of(layer)
    torch.testing.assert_close(found, truth(layer).float(), atol=1e-6, rtol=1e-6)
    assert layer.bias is not None


def test_outputs_and_gradients(quantised):
    layer, truth = quantised
    dash = loradash.DashLinear.from_linear(layer, config())
    with torch.no_grad():
        dash.lora_b.normal_()
    x = torch.randn(5, K, requires_grad=True)
    weight = truth(layer).float()
    expected = F.linear(x, weight + dash.delta(), layer.bias)
    y = dash(x)
    torch.testing.assert_close(y, expected, atol=1e-4, rtol=1e-4)
    (dx,) = torch.autograd.grad(y.sum(), x, retain_graph=True)
    torch.testing.assert_close(dx, torch.autograd.grad(expected.sum(), x)[0], atol=1e-4, rtol=1e-4)
    y.sum().backward()
    assert dash.lora_a.grad is not None and dash.lora_b.grad is not None
    assert all(not p.requires_grad for p in layer.parameters())
    dash.enabled = False
    torch.testing.assert_close(dash(x), layer(x))


def test_prelaunch(quantised, tmp_path):
    layer, truth = quantised
    model = loradash.apply_dash(nn.Sequential(nn.Linear(K, K), layer), config())
    schedule = loradash.DashSchedule(model, progress=False)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.randn(16, K)).square().mean().backward()
        optimizer.step()
        schedule.step()
    dash = model[1]
    assert bool(dash.launched)
    a, b = dash.lora_a.detach(), dash.lora_b.detach()
    wanted = task_specific_directions(truth(layer).float(), a, b, 3, scaling=dash.scaling)
    torch.testing.assert_close(dash.dash_u, wanted.u, atol=1e-4, rtol=1e-3)
    assert torch.isfinite(model(torch.randn(2, K))).all()
    loradash.save_adapter(model, tmp_path / "adapter")
    x, before = torch.randn(3, K), None
    before = model(x)
    with torch.no_grad():
        dash.lora_b.zero_()
    loradash.load_adapter(model, tmp_path / "adapter")
    torch.testing.assert_close(model(x), before)
    with pytest.raises(ValueError, match="is quantised and cannot take the update"):
        loradash.merge(model)
    loradash.export_lora(model, tmp_path / "lora")


def test_with_a_cache(quantised, tmp_path):
    """Decomposed in the background from the weights that the layers stand for, then launched from there."""
    layer, _ = quantised
    model = loradash.apply_dash(nn.Sequential(layer), config())
    with torch.no_grad():
        model[0].lora_b.normal_()
    cache = loradash.SpectralCache(tmp_path)
    background = cache.start(model)
    assert background.wait(600)
    assert cache.has(model[0].weight_nk())
    loradash.prelaunch(model, progress=False, cache=cache)
    assert bool(model[0].launched)


def test_bias_that_should_train(quantised):
    with pytest.raises(ValueError, match="train_bias=True: the bias of"):
        loradash.DashLinear.from_linear(quantised[0], config(train_bias=True))
