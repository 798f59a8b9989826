"""DashLinear on the device, through pre-launch, launch and dash phase, by the error rule."""

from __future__ import annotations

import copy

import loradash
import pytest
import torch
from loradash import DashConfig, DashLinear, DashSchedule
from support.matrix import poisoned
from torch import nn

from loradash_kernels import available_backends, explain_backend
from loradash_kernels.testing import Case, check_error_rule

CONFIG = DashConfig(r=8, directions=4, prelaunch_steps=3, dropout=0.1)
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
KERNELS = {"cpu": ("cpu",), "cuda": ("cuda", "triton")}


def check_layer(layer: DashLinear, rows: int) -> None:
    """One training step of it, judged as a case that its own tensors make."""
    device, dtype = layer.weight.device, layer.weight.dtype
    x = torch.randn(2, rows, layer.in_features, device=device).to(dtype).requires_grad_()
    dy = torch.randn(2 * rows, layer.out_features, device=device).to(dtype)
    names = ("weight", "bias", "lora_a", "lora_b", "dash_u", "dash_vt", "dash_sigma")
    tensors = {name: getattr(layer, name).detach() for name in names}
    # The bias is frozen; its gradient is known.
    case = Case({"x": x.detach().flatten(0, 1), **tensors}, dy, layer.scaling, layer.config.dropout, seed=11)
    layer.zero_grad()
    torch.manual_seed(case.seed)
    with poisoned(device):
        y = layer(x)
        y.backward(dy.view_as(y))
    assert x.grad is not None and layer.weight.grad is None and layer.bias.grad is None
    found = {"y": y.detach().flatten(0, 1), "x": x.grad.flatten(0, 1), "bias": dy.double().sum(0)}
    check_error_rule(case, found | {n: getattr(layer, n).grad for n in ("lora_a", "lora_b", "dash_sigma")})


@pytest.mark.parametrize("dtype", DTYPES)
def test_both_phases(device, sizes, dtype):
    """The layer itself, before launch and after, with its adapters in float32; and merged, whatever the merge rounds to."""
    m, k, n = sizes.tiles[-1]
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(k, n), nn.Tanh(), nn.Linear(n, k)).to(device, dtype)
    loradash.apply_dash(model, CONFIG)
    schedule = DashSchedule(model, progress=False)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    x = torch.randn(m, k, device=device).to(dtype)
    for step in range(6):
        optimizer.zero_grad()
        # Gradients of a mean over all numbers would vanish in float16.
        (model(x).float().square().sum() / m).backward()
        optimizer.step()
        assert schedule.step() == (step == 2)
        for layer in loradash.dash_layers(model).values():
            check_layer(layer, m // 2)
            # A layer whose gradients were looked at keeps none of them.
            layer.zero_grad()
    for layer in loradash.dash_layers(model).values():
        assert bool(layer.launched) and layer.dash_sigma.abs().min() > 0 and layer.dash_u.device == device
    before, kept = model.eval()(x), copy.deepcopy(model.state_dict())
    loradash.merge(model)
    error, unit = (model(x) - before).float().abs().max(), torch.finfo(dtype).eps
    assert error <= 8 * unit * before.float().abs().max(), "merging rounds a weight by more than its dtype does"
    loradash.unmerge(model)
    assert all(torch.equal(t, kept[name]) for name, t in model.state_dict().items())


def test_what_is_saved_for_backward(device, sizes):
    """Nothing of the size of x or y but x itself, mask or no mask."""
    m, k, n = sizes.tiles[0]
    layer = DashLinear(k, n, config=CONFIG, device=device, dtype=torch.bfloat16)
    x, saved = torch.randn(m, k, device=device, dtype=torch.bfloat16), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        layer(x)
    own = {t.data_ptr() for t in (x, *layer.parameters(), *layer.buffers())}
    others = [t for t in saved if t.data_ptr() not in own]
    assert sum(t.numel() * t.element_size() for t in others) <= 4 * m * (CONFIG.r + CONFIG.directions) + 16
    assert any(t.data_ptr() == x.data_ptr() for t in saved)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_default_is_kernels(device, dtype):
    """Plain PyTorch runs on a device only where no kernels can."""
    names = [name for name in KERNELS[device.type] if available_backends()[name] is None]
    if not names:
        pytest.skip(f"no kernels for {device} are here: {available_backends()}")
    choice = explain_backend(torch.empty(8, 64, dtype=dtype, device=device), width=12)
    assert choice.backend in KERNELS[device.type], str(choice)


def test_another_card_than_the_current_one(sizes, device):
    """Launches go to the card of x, whichever is current."""
    if device.type != "cuda" or torch.cuda.device_count() < 2:
        pytest.skip("needs two cards")
    other = torch.device("cuda", (device.index + 1) % torch.cuda.device_count())
    layer = DashLinear(*sizes.tiles[0][1:], config=CONFIG, device=other, dtype=torch.bfloat16)
    nn.init.normal_(layer.lora_b)
    check_layer(layer, 64)
