"""Adapters on disk: round trips, resuming in both phases, files that are damaged or do not fit, PEFT's format."""

from __future__ import annotations

import os

import loradash
import pytest
import torch
from loradash import AdapterError, DashConfig, DashSchedule, apply_dash, load_adapter, save_adapter
from safetensors.torch import save_file
from torch import nn


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(20, 30), nn.Tanh(), nn.Linear(30, 20), nn.Tanh(), nn.Linear(20, 3))


CONFIG = DashConfig(r=3, directions=2, prelaunch_steps=4, trainable_modules=["4"], overrides={"2": {"r": 5}})
X, LABELS = torch.randn(16, 20, generator=torch.Generator().manual_seed(1)), torch.arange(16) % 3


def train(model, steps, momentum=None):
    schedule = DashSchedule(model, progress=False)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(X), LABELS).backward()
        optimizer.step()
        schedule.step()
    return model


def trained(steps=6):
    return train(apply_dash(network(), CONFIG), steps)


@pytest.mark.parametrize("steps", [2, 6])
@pytest.mark.parametrize("adapted", [False, True])
def test_round_trip(tmp_path, steps, adapted):
    model = trained(steps)
    file = save_adapter(model, tmp_path)
    other = apply_dash(network(), CONFIG) if adapted else network()
    load_adapter(other, file)
    assert torch.equal(other(X), model(X))
    assert loradash.dash_state(other).step == steps
    assert loradash.dash_state(other).config == CONFIG
    assert [bool(x.launched) for x in loradash.dash_layers(other).values()] == [steps >= 4] * 2


@pytest.mark.parametrize("cut", [2, 5])
def test_resumed_training_is_the_same_training(tmp_path, cut):
    """Stopped before or after launch and resumed: bit for bit the weights of a run that was not stopped."""
    whole = trained(8)
    resumed = train(load_adapter(network(), save_adapter(trained(cut), tmp_path)), 8 - cut)
    ours, theirs = whole.state_dict(), resumed.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(v, theirs[k]) for k, v in ours.items())


def test_paths(tmp_path):
    model = trained()
    assert save_adapter(model, tmp_path / "deep" / "folder").name == "loradash_adapter.safetensors"
    assert save_adapter(model, tmp_path / "one.safetensors") == tmp_path / "one.safetensors"
    load_adapter(network(), tmp_path / "deep" / "folder")


def damaged(tmp_path, kind):
    file = save_adapter(trained(), tmp_path / "a.safetensors")
    if kind == "truncated":
        file.write_bytes(file.read_bytes()[:-100])
    elif kind == "empty":
        file.write_bytes(b"")
    elif kind == "text":
        file.write_text("{'a': 1}" * 100)
    elif kind == "foreign":
        save_file({"a": torch.zeros(2)}, file, metadata={"format": "pt"})
    elif kind == "missing":
        file.unlink()
    return file


@pytest.mark.parametrize("kind", ["truncated", "empty", "text", "foreign", "missing"])
@pytest.mark.parametrize("adapted", [False, True])
def test_damaged_files(tmp_path, kind, adapted):
    file = damaged(tmp_path, kind)
    model = apply_dash(network(), CONFIG) if adapted else network()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(AdapterError, match=r"a\.safetensors"):
        load_adapter(model, file)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert adapted == any(isinstance(m, loradash.DashLinear) for m in model.modules())


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (
            lambda: nn.Sequential(nn.Linear(20, 31), nn.Tanh(), nn.Linear(31, 20), nn.Tanh(), nn.Linear(20, 3)),
            "has shape",
        ),
        (lambda: nn.Sequential(nn.Linear(20, 30), nn.Tanh(), nn.Linear(30, 20)), "has no place|does not fit"),
        (
            lambda: nn.Sequential(nn.Linear(20, 30), nn.Tanh(), nn.Linear(30, 20), nn.Linear(20, 9), nn.Linear(9, 3)),
            "missing|shape",
        ),
        (lambda: apply_dash(network(), DashConfig(r=2)), "shape|missing|place"),
    ],
)
def test_other_models(tmp_path, other, message):
    file = save_adapter(trained(), tmp_path)
    model = other()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(AdapterError, match=message):
        load_adapter(model, file)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_a_failed_save_keeps_the_old_file(tmp_path, monkeypatch):
    file = save_adapter(trained(2), tmp_path)
    before = file.read_bytes()

    def broken(*args):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", broken)
    with pytest.raises(OSError, match="disk full"):
        save_adapter(trained(6), tmp_path)
    assert file.read_bytes() == before
    assert list(tmp_path.iterdir()) == [file]


def test_trained_biases_travel(tmp_path):
    config = DashConfig(r=2, directions=1, prelaunch_steps=2, train_bias=True)
    model = train(apply_dash(network(), config), 3)
    assert torch.equal(load_adapter(network(), save_adapter(model, tmp_path))(X), model(X))
    with pytest.raises(ValueError, match="train_bias"):
        loradash.export_lora(model, tmp_path)


def test_no_adapters(tmp_path):
    with pytest.raises(ValueError, match="apply_dash"):
        save_adapter(network(), tmp_path)
