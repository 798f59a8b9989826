"""DashLinear, apply_dash and DashSchedule."""

from __future__ import annotations

import copy

import loradash
import pytest
import torch
from loradash import DashConfig, DashLinear, DashSchedule, apply_dash
from torch import nn

from loradash_kernels import task_specific_directions


class Net(nn.Module):
    """Two blocks that share a layer, a tied pair of weights, a layer nobody calls and a head."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(24, 32), nn.Tanh(), nn.Linear(32, 24))
        self.again = self.inner[0]
        self.embed = nn.Embedding(11, 24)
        self.out = nn.Linear(24, 11, bias=False)
        self.out.weight = self.embed.weight
        self.unused = nn.Linear(24, 24)
        self.head = nn.Linear(11, 3)

    def forward(self, ids):
        x = self.embed(ids)
        x = self.inner(x) + nn.functional.pad(self.again(x), (0, -8))
        return self.head(self.out(x).mean(1))


CONFIG = DashConfig(r=3, directions=4, prelaunch_steps=3, dropout=0.1, trainable_modules=["head"])
IDS = torch.arange(40).view(8, 5) % 11
LABELS = torch.arange(8) % 3


def train(model, steps, schedule, optimizer=None):
    optimizer = optimizer or torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    launched = []
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(IDS), LABELS).backward()
        optimizer.step()
        launched.append(schedule.step())
    return launched


def launched_model(steps=6):
    torch.manual_seed(0)
    model = apply_dash(Net(), CONFIG)
    schedule = DashSchedule(model, progress=False)
    with pytest.warns(UserWarning, match="unused"):
        train(model, steps, schedule)
    return model, schedule


def test_a_fresh_adapter_changes_nothing():
    torch.manual_seed(0)
    model = Net()
    expected = model(IDS)
    torch.testing.assert_close(apply_dash(model, CONFIG).eval()(IDS), expected)


def test_shared_modules_and_tied_weights():
    model = apply_dash(Net(), CONFIG)
    assert isinstance(model.again, DashLinear)
    assert model.again is model.inner[0]
    assert model.out.weight is model.embed.weight
    assert len(loradash.dash_layers(model)) == 4


def test_what_trains():
    model = apply_dash(Net(), CONFIG)
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    assert {n.rsplit(".", 1)[1] for n in trainable} == {"lora_a", "lora_b", "dash_sigma", "weight", "bias"}
    assert {n for n in trainable if n.endswith(("weight", "bias"))} == {"head.weight", "head.bias"}
    summary = loradash.summary(model)
    assert summary.adapters + summary.other_trainable == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert summary.layers == 4
    assert f"{summary.adapters:,}" in str(summary)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"target_modules": ["inner.0", "out"]}, {"inner.0", "out"}),
        ({"target_modules": ["0"]}, {"inner.0"}),
        ({"target_modules": r"inner\..*"}, {"inner.0", "inner.2"}),
        ({"exclude_modules": ["head", "unused"]}, {"inner.0", "inner.2", "out"}),
        ({"trainable_modules": ["inner"]}, {"out", "unused", "head"}),
    ],
)
def test_targets(options, expected):
    assert set(loradash.dash_layers(apply_dash(Net(), DashConfig(**options)))) == expected


def test_overrides():
    model = apply_dash(
        Net(), DashConfig(r=2, overrides={"out": {"r": 5, "alpha": 10, "directions": 1}, r"inner\.\d": {"r": 3}})
    )
    assert model.out.lora_a.shape == (5, 24)
    assert model.out.scaling == 2.0
    assert model.out.dash_sigma.numel() == 1
    assert model.inner[0].config.r == model.inner[2].config.r == 3
    assert model.head.config.r == 2


def test_nothing_matches():
    model = Net()
    before = {n: p.requires_grad for n, p in model.named_parameters()}
    with pytest.raises(ValueError, match=r"target_modules=\['nope'\] matches none of the 5 linear layers: inner.0"):
        apply_dash(model, DashConfig(target_modules=["nope"]))
    assert {n: p.requires_grad for n, p in model.named_parameters()} == before
    apply_dash(model, CONFIG)
    with pytest.raises(ValueError, match="already"):
        apply_dash(model, CONFIG)


@pytest.mark.parametrize(
    "options", [{"r": 0}, {"dropout": 1.0}, {"svd": "x"}, {"directions": -1}, {"overrides": {"a": {"dropout": 1}}}]
)
def test_bad_settings(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        DashConfig(**options)


def test_rslora():
    assert DashConfig(r=4, alpha=8, use_rslora=True).scaling == 4.0


def test_transposed_weights():
    torch.manual_seed(0)
    conv = pytest.importorskip("transformers.pytorch_utils").Conv1D(48, 64)
    nn.init.normal_(conv.bias)
    layer = DashLinear.from_linear(conv, DashConfig(r=2, directions=2))
    x = torch.randn(70, 64, requires_grad=True)
    torch.testing.assert_close(layer(x), conv(x), rtol=1e-4, atol=1e-5)
    nn.init.normal_(layer.lora_b)
    y = layer(x)
    layer.merge()
    torch.testing.assert_close(layer(x), y, rtol=1e-4, atol=1e-4)
    with pytest.raises(TypeError, match="Embedding"):
        DashLinear.from_linear(nn.Embedding(2, 2))


def test_schedule_launches_once_at_its_step():
    torch.manual_seed(0)
    model = apply_dash(Net(), CONFIG)
    schedule = DashSchedule(model, progress=False)
    with (
        pytest.warns(UserWarning, match="stay plain LoRA: unused"),
        pytest.warns(UserWarning, match="no gradient for 1 of 4"),
    ):
        assert train(model, 7, schedule) == [False, False, True, False, False, False, False]
    assert {r.name for r in schedule.reports} == {"inner.0", "inner.2", "out"}
    for report in schedule.reports:
        layer = loradash.dash_layers(model)[report.name]
        assert bool(layer.launched)
        # Δσ has trained since launch.
        assert layer.dash_sigma.abs().min() > 0
    assert not bool(model.unused.launched)
    assert "phase=dash" in repr(model.inner[0])


def test_launch_writes_what_was_found():
    torch.manual_seed(0)
    layer = DashLinear(24, 32, config=DashConfig(r=2, directions=3))
    nn.init.normal_(layer.lora_b)
    found = task_specific_directions(layer.weight, layer.lora_a, layer.lora_b, 3, scaling=layer.scaling)
    x = torch.randn(4, 24)
    before = layer(x)
    layer.launch(found)
    # The coordinates start at zero.
    assert torch.equal(layer(x), before)
    assert torch.equal(layer.dash_u, found.u)
    with pytest.raises(ValueError, match=r"directions\.u has shape"):
        layer.launch(task_specific_directions(layer.weight, layer.lora_a, layer.lora_b, 2))


def test_failed_prelaunch_changes_nothing():
    torch.manual_seed(0)
    model = apply_dash(Net(), CONFIG)
    for layer in loradash.dash_layers(model).values():
        nn.init.normal_(layer.lora_b)
    with torch.no_grad():
        model.inner[2].weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match="not finite"):
        loradash.prelaunch(model, progress=False)
    assert not any(bool(layer.launched) for layer in loradash.dash_layers(model).values())
    assert not DashSchedule(model).launched


def test_dash_only():
    model, _ = launched_model()
    loradash.dash_only(loradash_without_unused := _without_unused(model))
    assert {
        n.rsplit(".", 1)[1]
        for n, p in loradash_without_unused.named_parameters()
        if p.requires_grad and "head" not in n
    } == {"dash_sigma"}
    with pytest.raises(ValueError, match="dash_only comes after launch"):
        loradash.dash_only(apply_dash(Net(), CONFIG))


def _without_unused(model):
    model.unused = nn.Identity()
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merge_and_exact_restore(dtype):
    model, _ = launched_model()
    model = model.eval().to(dtype)
    expected, original = model(IDS), {n: p.clone() for n, p in model.state_dict().items()}
    loradash.merge(model)
    loradash.merge(model)
    tolerance = 1e-4 if dtype == torch.float32 else 0.1
    torch.testing.assert_close(model(IDS), expected, rtol=tolerance, atol=tolerance)
    # The embedding is tied to a merged layer.
    assert torch.equal(model.embed.weight, original["embed.weight"])
    loradash.unmerge(model)
    assert model.out.weight is model.embed.weight
    assert all(torch.equal(p, original[n]) for n, p in model.state_dict().items())
    assert torch.equal(model(IDS), expected)


def test_disable_is_the_base_model():
    torch.manual_seed(0)
    base = Net()
    model = apply_dash(copy.deepcopy(base), CONFIG)
    with pytest.warns(UserWarning, match="unused"):
        train(model, 4, DashSchedule(model, progress=False))
    base.head = model.head
    model.eval()
    expected = model(IDS)
    with loradash.disable(model):
        torch.testing.assert_close(model(IDS), base.eval()(IDS))
    assert torch.equal(model(IDS), expected)
    loradash.merge(model)
    with loradash.disable(model):
        torch.testing.assert_close(model(IDS), base(IDS))
    assert all(layer.merged for layer in loradash.dash_layers(model).values())


def test_prelaunch_refuses_merged_layers():
    model, _ = launched_model(1 + CONFIG.prelaunch_steps)
    loradash.merge(model)
    with pytest.raises(ValueError, match="unmerge"):
        loradash.prelaunch(model)
