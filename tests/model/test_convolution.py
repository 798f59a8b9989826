"""Convolutions that are linear layers over channels: the whole life of an adapter on one, beside the linear layer it is."""

from __future__ import annotations

import copy

import loradash
import pytest
import torch
from loradash import DashConfig, DashLinear, DashSchedule, apply_dash
from loradash.convolution import DashConvolution
from torch import nn

K, N = 16, 24
KINDS = {
    "1d": lambda: nn.Conv1d(K, N, 1),
    "2d": lambda: nn.Conv2d(K, N, 1),
    "2d-strides": lambda: nn.Conv2d(K, N, 1, stride=(2, 3), bias=False),
    "3d-same": lambda: nn.Conv3d(K, N, 1, padding="same"),
}


def config(**settings):
    return DashConfig(**{"r": 4, "directions": 4, "target_modules": ["conv"], **settings})


def space(conv):
    return (5, 7, 4)[: len(conv.stride)]


@pytest.fixture(params=KINDS)
def conv(request):
    return KINDS[request.param]()


def within(conv):
    return nn.Sequential(nn.Identity(), nn.ModuleDict({"conv": conv}))


def adapted(conv, launched=True, **settings):
    """A model around it, with an adapter that does something."""
    model = apply_dash(within(conv), config(**settings))
    layer = model[1]["conv"]
    nn.init.normal_(layer.lora_b)
    if launched:
        loradash.prelaunch(model, progress=False)
        nn.init.normal_(layer.dash_sigma)
    return model, layer


def as_linear(layer):
    """The linear layer with the same adapter."""
    linear = nn.Linear(K, N, layer.base.bias is not None)
    with torch.no_grad():
        linear.weight.copy_(layer.base.weight.flatten(1))
        if linear.bias is not None:
            linear.bias.copy_(layer.base.bias)
    plain = DashLinear.from_linear(linear, layer.config)
    plain.load_state_dict({k: t for k, t in layer.state_dict().items() if "base" not in k}, strict=False)
    return plain


def run(layer, x, dy):
    x = x.clone().requires_grad_()
    torch.manual_seed(3)
    y = layer(x)
    leaves = [x, layer.lora_a, layer.lora_b, layer.dash_sigma]
    return y.detach(), *torch.autograd.grad(y, leaves, dy)


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("channels_last", [False, True])
def test_forward_and_backward_are_those_of_the_linear_layer(conv, p, channels_last):
    _, layer = adapted(conv, dropout=p)
    assert type(layer) is DashConvolution and layer.base is conv
    x = torch.randn(3, K, *space(conv))
    if channels_last and x.dim() == 4:
        x = x.contiguous(memory_format=torch.channels_last)
    expected = conv(x)
    y, dx, *grads = run(layer, x, dy := torch.randn_like(expected))
    assert y.stride() == expected.stride()
    taken = (..., *(slice(None, None, step) for step in conv.stride))
    rows = x[taken].movedim(1, -1)
    plain, low_dx, *plain_grads = run(as_linear(layer), rows, dy.movedim(1, -1))
    torch.testing.assert_close(y, plain.movedim(-1, 1), rtol=1e-4, atol=1e-4)
    whole = torch.zeros_like(x)
    whole[taken] = low_dx.movedim(-1, 1)
    for found, wanted in zip((dx, *grads), (whole, *plain_grads), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-3)


def test_an_image_alone(conv):
    _, layer = adapted(conv)
    x = torch.randn(2, K, *space(conv))
    torch.testing.assert_close(layer(x[0]), layer(x)[0], rtol=1e-4, atol=1e-4)


def test_merge_unmerge_and_unload(conv):
    model, layer = adapted(conv)
    x, weight = torch.randn(2, K, *space(conv)), conv.weight
    before, y = weight.clone(), layer(x).detach()
    loradash.merge(model)
    assert conv.weight.shape == before.shape
    torch.testing.assert_close(layer(x), y, rtol=1e-4, atol=1e-4)
    loradash.unmerge(model)
    assert conv.weight is weight and torch.equal(weight, before)
    with loradash.disable(model):
        assert torch.equal(layer(x), conv(x))
    loradash.merge_and_unload(model)
    assert model[1]["conv"] is conv
    torch.testing.assert_close(conv(x), y, rtol=1e-4, atol=1e-4)


def test_saved_loaded_and_warmed_up(conv, tmp_path):
    plain = within(copy.deepcopy(conv))
    model, layer = adapted(conv)
    loradash.save_adapter(model, tmp_path / "adapter")
    again = loradash.load_adapter(plain, tmp_path / "adapter")[1]["conv"]
    x = torch.randn(2, K, *space(conv))
    assert torch.equal(again(x), layer(x)) and bool(again.launched)
    assert [run.name for run in loradash.warm_up(model, rows=[8], progress=False)] == ["1.conv"]


def test_beside_an_adapter_that_leaves_it_out(tmp_path):
    """target_modules=None takes linear layers, whatever another adapter has; rows of both in one batch."""

    def network():
        torch.manual_seed(0)
        return nn.ModuleDict({"conv": nn.Conv2d(K, N, 1), "head": nn.Linear(N, 3)})

    def output(model, x):
        return model["head"](model["conv"](x).mean((-1, -2)))

    model = apply_dash(network(), config(target_modules=["conv", "head"]), adapter="all")
    loradash.add_adapter(model, "linear", config(target_modules=None))
    assert model["conv"].adapters == ["all"]
    x, wanted = torch.randn(2, K, 3, 3), {}
    for name in ("linear", "all"):
        loradash.set_adapter(model, name)
        for layer in loradash.dash_layers(model).values():
            nn.init.normal_(layer.lora_b)
        wanted[name] = output(model, x)
        alone = loradash.load_adapter(network(), loradash.save_adapter(model, tmp_path / name))
        torch.testing.assert_close(output(alone, x), wanted[name])
        swapped = apply_dash(network(), config(target_modules=["conv", "head"]))
        torch.testing.assert_close(output(loradash.hotswap_adapter(swapped, tmp_path / name), x), wanted[name])
    with loradash.mixed_batch(model, ["linear", "all"]):
        torch.testing.assert_close(output(model, x), torch.stack((wanted["linear"][0], wanted["all"][1])))


def test_exported_to_peft(conv, tmp_path):
    peft = pytest.importorskip("peft")
    model, layer = adapted(conv)
    model.eval()
    x = torch.randn(2, K, *space(conv))
    y = layer(x).detach()
    loradash.export_lora(model, tmp_path)
    served = peft.PeftModel.from_pretrained(within(conv), tmp_path).eval()
    torch.testing.assert_close(served.base_model.model[1]["conv"](x), y, rtol=1e-4, atol=1e-4)


def test_a_training_run_through_launch():
    model = apply_dash(
        nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1)), config(target_modules=["1"], prelaunch_steps=2)
    )
    schedule, optimizer = DashSchedule(model), torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    for _ in range(4):
        model(torch.randn(2, 3, 6, 6)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    assert bool(model[1].launched) and bool(model[1].dash_sigma.any())


def test_from_linear_says_what_it_takes():
    with pytest.raises(TypeError, match="got Conv2d"):
        DashLinear.from_linear(nn.Conv2d(4, 4, 1))
    with pytest.raises(
        ValueError, match=r"itself one layer, Conv2d; adapt it by loradash\.convolution\.DashConvolution"
    ):
        apply_dash(nn.Conv2d(4, 4, 1), DashConfig(target_modules=".*"))
    with pytest.raises(ValueError, match="is no linear layer over channels"):
        DashConvolution.from_linear(nn.Conv2d(4, 4, 3))
    with pytest.raises(ValueError, match="the bias of Conv2d belongs to the layer kept whole"):
        apply_dash(nn.ModuleDict({"conv": nn.Conv2d(4, 4, 1)}), config(train_bias=True))
