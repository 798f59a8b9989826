"""The authors' LoRA-Dash layers (github.com/Chongjie-Si/Subspace-Tuning): their behaviour restated, and their own files.

What is restated is what can be read from their repository and seen by running it: names of attributes, forward calls
counted in FLAG, the directions chosen in the call after `warmup` of them, rates without eps, a dense product for each term,
two draws of dropout. LORADASH_AUTHORS names a clone of theirs, whose files then serve beside the restatement.
"""

from __future__ import annotations

import importlib.util
import itertools
import os
import sys
import types
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

DIALECTS = ("loralib", "cr_mr", "sdg")
SOURCES = ("restated", "theirs")
CLONE = os.environ.get("LORADASH_AUTHORS")
FILES = {
    "loralib": "loralib/loralib/layers_LoRA-Dash.py",
    "cr_mr": "CR_MR/peft/src/peft/tuners/lora-dash.py",
    "sdg": "SdG/peft/tuners/lora/layer.py",
}


def _respond(layer, x, base_output, weight, parts, keep):
    """What a layer of theirs adds to its base output. keep(u, vt) stores the directions at launch."""
    a, b, index, u, vt, scale, drop = parts
    update = scale * (b @ a)
    y = base_output + F.linear(drop(x), update)
    if layer.warmup > layer.FLAG:
        layer.FLAG += 1
        return y
    if layer.warmup == layer.FLAG:
        left, sigma, right = torch.linalg.svd(weight.detach(), full_matrices=False)
        change = torch.einsum("ni,nk,ik->i", left, update.detach(), right)
        order = (change.abs() / sigma.abs()).topk(layer.index).indices
        u, vt = keep(left[:, order], right[order], sigma, change)
        layer.FLAG += 1
    return y + F.linear(drop(x), u @ index.reshape(-1).diag() @ vt)


class _LoraFields:
    def _note(self, r, lora_alpha, lora_dropout, fan_in_fan_out, merge_weights):
        self.r, self.lora_alpha, self.scaling = r, lora_alpha, lora_alpha / r
        self.lora_dropout = nn.Dropout(lora_dropout) if lora_dropout else (lambda x: x)
        self.fan_in_fan_out, self.merge_weights, self.merged = fan_in_fan_out, merge_weights, False
        self.index, self.warmup, self.FLAG = 8, 100, 0
        self.weight.requires_grad = False

    def _plain(self):
        return self.weight.T if self.fan_in_fan_out else self.weight


class LoralibLinear(_LoraFields, nn.Linear):
    def __init__(self, k, n, r, lora_alpha=1, lora_dropout=0.0, fan_in_fan_out=False, merge_weights=True, **options):
        nn.Linear.__init__(self, k, n, **options)
        self._note(r, lora_alpha, lora_dropout, fan_in_fan_out, merge_weights)
        if fan_in_fan_out:
            self.weight.data = self.weight.data.T
        new = self.weight.new_zeros
        self.lora_A, self.lora_B = nn.Parameter(new(r, k)), nn.Parameter(new(n, r))
        self.lora_index = nn.Parameter(new(8))
        self.weight_u_top, self.weight_vt_top = nn.Parameter(new(n, 8)), nn.Parameter(new(8, k))
        nn.init.kaiming_uniform_(self.lora_A, a=5**0.5)

    def forward(self, x):
        def keep(u, vt, sigma, change):
            self.weight_u_top.data, self.weight_vt_top.data = u, vt
            self.lora_change_a, self.lora_change_bb = nn.Parameter(sigma), nn.Parameter(change)
            return self.weight_u_top, self.weight_vt_top

        for frozen in (self.weight_u_top, self.weight_vt_top):
            frozen.requires_grad = False
        parts = (self.lora_A, self.lora_B, self.lora_index, self.weight_u_top, self.weight_vt_top)
        out = F.linear(x, self._plain(), self.bias)
        return _respond(self, x, out, self.weight, (*parts, self.scaling, self.lora_dropout), keep)


class CrMrLinear(_LoraFields, nn.Linear):
    def __init__(self, k, n, r, lora_alpha=1, lora_dropout=0.0, fan_in_fan_out=False, merge_weights=True, **options):
        nn.Linear.__init__(self, k, n, **options)
        self._note(r, lora_alpha, lora_dropout, fan_in_fan_out, merge_weights)
        if fan_in_fan_out:
            self.weight.data = self.weight.data.T
        self.disable_adapters = False
        self.lora_A, self.lora_B = nn.Linear(k, r, bias=False), nn.Linear(r, n, bias=False)
        self.lora_index = nn.Linear(8, 1, bias=False)
        self.lora_w_u, self.lora_w_vt = nn.Parameter(torch.zeros(n, 8)), nn.Parameter(torch.zeros(8, k))
        nn.init.zeros_(self.lora_B.weight)
        nn.init.zeros_(self.lora_index.weight)

    def train(self, mode=True):
        nn.Module.train(self, mode)
        if not mode and self.merge_weights and not self.merged:
            update = self.scaling * (self.lora_B.weight @ self.lora_A.weight)
            update = update + self.lora_w_u @ self.lora_index.weight.reshape(-1).diag() @ self.lora_w_vt
            self.weight.data += update.detach()
            self.merged = True
        return self

    def forward(self, x):
        def keep(u, vt, sigma, change):
            self.lora_w_u, self.lora_w_vt = (nn.Parameter(t, requires_grad=False) for t in (u, vt))
            return self.lora_w_u, self.lora_w_vt

        out = F.linear(x, self._plain(), self.bias)
        if self.merged:
            return out
        factors = (self.lora_A.weight, self.lora_B.weight, self.lora_index.weight, self.lora_w_u, self.lora_w_vt)
        return _respond(self, x, out, self.weight, (*factors, self.scaling, self.lora_dropout), keep)


class SdgLinear(nn.Module):
    def __init__(self, base_layer, adapter_name, r, lora_alpha=1, lora_dropout=0.0, lora_use_dash=True, **_):
        super().__init__()
        base_layer.requires_grad_(False)
        k, n = base_layer.in_features, base_layer.out_features
        self.base_layer, self.active_adapters, self.fan_in_fan_out = base_layer, [adapter_name], False
        self.r, self.lora_alpha, self.scaling = ({adapter_name: v} for v in (r, lora_alpha, lora_alpha / r))
        self.use_dora, self.lora_use_dash = {adapter_name: False}, {adapter_name: lora_use_dash}
        self.merged = self.disable_adapters = False
        self.index, self.warmup, self.FLAG = 8, 100, 0
        drop = nn.Dropout(lora_dropout) if lora_dropout else nn.Identity()
        for name, module in {
            "lora_dropout": drop,
            "lora_A": nn.Linear(k, r, bias=False),
            "lora_B": nn.Linear(r, n, bias=False),
            "lora_index": nn.Linear(8, 1, bias=False),
        }.items():
            setattr(self, name, nn.ModuleDict({adapter_name: module}))
        self.lora_w_u = nn.ParameterDict({adapter_name: nn.Parameter(torch.zeros(n, 8))})
        self.lora_w_vt = nn.ParameterDict({adapter_name: nn.Parameter(torch.zeros(8, k))})
        nn.init.zeros_(self.lora_B[adapter_name].weight)
        nn.init.zeros_(self.lora_index[adapter_name].weight)

    def forward(self, x):
        if self.merged or self.disable_adapters:
            return self.base_layer(x)
        (name,) = self.active_adapters

        def keep(u, vt, sigma, change):
            self.lora_w_u[name], self.lora_w_vt[name] = (nn.Parameter(t, requires_grad=False) for t in (u, vt))
            return self.lora_w_u[name], self.lora_w_vt[name]

        weights = (self.lora_A[name].weight, self.lora_B[name].weight, self.lora_index[name].weight)
        parts = (*weights, self.lora_w_u[name], self.lora_w_vt[name], self.scaling[name], self.lora_dropout[name])
        return _respond(self, x, self.base_layer(x), self.base_layer.weight, parts, keep)


RESTATED = {"loralib": LoralibLinear, "cr_mr": CrMrLinear, "sdg": SdgLinear}
for _cls in RESTATED.values():
    # By this name they are told apart from others.
    _cls.__name__ = "Linear"


def _module(name, file, **stand_ins):
    """A file of theirs as a module of a package of ours, beside modules that stand in for those it imports from there."""
    for inner, contents in stand_ins.items():
        sys.modules[f"authors.{inner}"] = stand_in = types.ModuleType(f"authors.{inner}")
        vars(stand_in).update(contents)
    for package in ("authors", *(f"authors.{name}".rsplit(".", i)[0] for i in range(1, name.count(".") + 1))):
        if package not in sys.modules:
            sys.modules[package] = types.ModuleType(package)
            sys.modules[package].__path__ = []
    spec = importlib.util.spec_from_file_location(f"authors.{name}", file)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _utils():
    @dataclass
    class PeftConfig:
        inference_mode: bool = False

    return {
        "PeftConfig": PeftConfig,
        "PeftType": types.SimpleNamespace(LORA="LORA"),
        "transpose": lambda weight, fan_in_fan_out: weight.T if fan_in_fan_out else weight,
    }


def _theirs(dialect):
    file = Path(CLONE or "") / FILES[dialect]
    if dialect == "loralib":
        # It imports the name with capitals; the tree has it without.
        _module("loralib.layers_LoRA", file.with_name("layers_lora.py"))
        return _module("loralib.layers", file).Linear
    pytest.importorskip("transformers")
    if dialect == "cr_mr":
        return _module("cr_mr.tuners.lora", file, **{"cr_mr.utils": _utils()}).Linear
    pytest.importorskip("peft")
    return _module("sdg.lora.layer", file, **{"sdg.lora.config": {"LoraConfig": object}}).Linear


def layer_class(dialect, source="restated"):
    """Their class, restated or from their own file; skips where there is no clone."""
    if source == "restated":
        return RESTATED[dialect]
    if CLONE is None:
        pytest.skip("LORADASH_AUTHORS names no clone of the authors' repository")
    return _theirs(dialect)


def make_layer(dialect, source, k, n, r=4, alpha=8, dropout=0.0, warmup=100, **options):
    """A layer of theirs, of whichever dialect."""
    cls = layer_class(dialect, source)
    if dialect == "sdg":
        base = nn.Linear(k, n, **options).requires_grad_(False)
        layer = cls(base, "default", r, alpha, dropout, lora_use_dash=True)
    else:
        layer = cls(k, n, r, alpha, dropout, **options)
    layer.warmup = warmup
    return layer


def make_model(dialect, source, widths=(24, 32, 16), seed=0, **settings):
    """Layers of theirs in a row with a nonlinearity between, biases frozen as by their `mark_only_lora_as_trainable`."""
    torch.manual_seed(seed)
    layers = [make_layer(dialect, source, k, n, **settings) for k, n in itertools.pairwise(widths)]
    model = nn.Sequential(*[m for layer in layers for m in (layer, nn.Tanh())][:-1])
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name and "lora_w" not in name)
    return model


WIDTH, CLASSES = 24, 16
OPTIMIZERS = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, 0.3),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, 3e-3),
}


def batches(steps, seed=1):
    """Inputs and targets that these models can learn, one stream for a seed."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        x = torch.randn(16, WIDTH, generator=generator)
        yield x, x[:, :CLASSES] + 0.1 * torch.randn(16, CLASSES, generator=generator)


def losses_of(model, steps, optimizer="sgd", schedule=None, skip=0, seed=1):
    """Trains; the losses of some steps of one stream of batches, from step `skip` on."""
    if not isinstance(optimizer, torch.optim.Optimizer):
        optimizer = OPTIMIZERS[optimizer]([p for p in model.parameters() if p.requires_grad])
    losses = []
    for x, target in itertools.islice(batches(skip + steps, seed), skip, None):
        optimizer.zero_grad()
        loss = (model(x) - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if schedule is not None:
            schedule.step()
    return torch.tensor(losses, dtype=torch.float64)


def trained(model, steps, schedule=None, **arguments):
    losses_of(model, steps, schedule=schedule, **arguments)
    return model
