"""Trains, exports, and compares with what PEFT makes of the file."""

from __future__ import annotations

import copy
import json

import loradash
import pytest
import torch
from loradash import DashConfig, dash_layers, export_lora
from loradash.targets import trainable_modules

peft = pytest.importorskip("peft")

X = torch.randn(4, 8, generator=torch.Generator().manual_seed(1))


def config(**settings):
    return DashConfig(**{"r": 3, "directions": 2, "dropout": 0.1, **settings})


def trained(model):
    """Everything that trains gets values as after a launch and some steps."""
    with torch.no_grad():
        for layer in dash_layers(model).values():
            layer.launched.fill_(True)
            for tensor in (layer.lora_b, layer.dash_u, layer.dash_vt, layer.dash_sigma):
                tensor.normal_(0, 0.3)
        for module in trainable_modules(model, loradash.dash_state(model).config).values():
            for parameter in module.parameters():
                parameter.add_(torch.randn(parameter.shape), alpha=0.1)
    return model.eval()


def outputs(model, inputs):
    with torch.no_grad():
        y = model(**inputs) if isinstance(inputs, dict) else model(inputs)
    return y if isinstance(y, torch.Tensor) else y[0]


def served_like(base, model, folder, inputs=X, tolerance=1e-5):
    """PEFT, over a copy of the base, gives the trained model's outputs, and they are not the base's."""
    wanted = outputs(model, inputs)
    export_lora(model, folder)
    served = peft.PeftModel.from_pretrained(copy.deepcopy(base).eval(), str(folder)).eval()
    torch.testing.assert_close(outputs(served, inputs), wanted, rtol=tolerance, atol=tolerance)
    assert (wanted - outputs(base.eval(), inputs)).abs().max() > 10 * tolerance
    return served


def settings_of(folder):
    return json.loads((folder / "adapter_config.json").read_text())
