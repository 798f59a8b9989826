"""The authors' LoRA-Dash layers (github.com/Chongjie-Si/Subspace-Tuning): their behaviour restated, and their own files.

What is restated is what can be read from their repository and seen by running it: names of attributes, forward calls counted in
FLAG, the directions chosen in the call after `warmup` of them, rates without eps, the LoRA term added in place, the dash term as
a dense matrix that is formed and multiplied in every step, two draws of dropout. LORADASH_AUTHORS names a clone of theirs, whose
files then serve beside the restatement.
"""

from __future__ import annotations

import importlib.util
import itertools
import os
import sys
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from loradash_kernels import Directions

SOURCES = ("restated", "theirs")
CLONE = os.environ.get("LORADASH_AUTHORS")
FILES = {
    "loralib": "loralib/loralib/layers_LoRA-Dash.py",
    "cr_mr": "CR_MR/peft/src/peft/tuners/lora-dash.py",
    "sdg": "SdG/peft/tuners/lora/layer.py",
}
DIALECTS = tuple(FILES)


class NoClone(LookupError):
    """The authors' own files were asked for, and LORADASH_AUTHORS names no clone."""


class _Restated(nn.Module):
    """What the three layers do alike: `parts` and `keep` say where each has its tensors."""

    def note(self, r: int, lora_alpha: float, lora_dropout: float, fan_in_fan_out: bool, merge_weights: bool) -> None:
        self.r, self.lora_alpha, self.scaling = r, lora_alpha, lora_alpha / r
        self.lora_dropout = nn.Dropout(lora_dropout) if lora_dropout else (lambda x: x)
        self.fan_in_fan_out, self.merge_weights, self.merged = fan_in_fan_out, merge_weights, False
        self.weight.requires_grad = False
        self.count()
        if fan_in_fan_out:
            self.weight.data = self.weight.data.T

    def count(self) -> None:
        self.index, self.warmup, self.FLAG = 8, 100, 0

    def parts(self) -> tuple[Tensor, ...]:
        """A, B, the coordinates, U, Vᵀ."""
        raise NotImplementedError

    def keep(self, u: Tensor, vt: Tensor, sigma: Tensor, change: Tensor) -> None:
        """Stores what launch found."""
        raise NotImplementedError

    def base_output(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.T if self.fan_in_fan_out else self.weight, self.bias)

    def setting(self) -> tuple[Tensor, float, Callable[[Tensor], Tensor]]:
        """The frozen weight as it is stored, the scaling, the dropout."""
        return self.weight, self.scaling, self.lora_dropout

    def respond(self, x: Tensor) -> Tensor:
        a, b, *_ = self.parts()
        weight, scaling, drop = self.setting()
        y = self.base_output(x)
        y += drop(x) @ a.T @ b.T * scaling
        if self.warmup > self.FLAG:
            self.FLAG += 1
            return y
        if self.warmup == self.FLAG:
            self.choose(weight.detach(), scaling * (b @ a).detach())
            self.FLAG += 1
        return y + self.dash(drop(x))

    def choose(self, weight: Tensor, update: Tensor) -> None:
        left, sigma, right = torch.linalg.svd(weight, full_matrices=False)
        change = torch.einsum("ni,nk,ik->i", left, update, right)
        order = (change.abs() / sigma.abs()).topk(self.index).indices
        self.keep(left[:, order], right[order], sigma, change)

    def dash(self, x: Tensor) -> Tensor:
        """The dash term (..., N) of a dropped x (..., K)."""
        *_, index, u, vt = self.parts()
        return x @ (u @ index.reshape(-1).diag() @ vt).T


class LoralibLinear(_Restated, nn.Linear):
    def __init__(
        self, k, n, r, lora_alpha=1, lora_dropout=0.0, fan_in_fan_out=False, merge_weights=True, **options
    ) -> None:
        nn.Linear.__init__(self, k, n, **options)
        new = self.weight.new_zeros
        self.note(r, lora_alpha, lora_dropout, fan_in_fan_out, merge_weights)
        self.lora_A, self.lora_B = nn.Parameter(new(r, k)), nn.Parameter(new(n, r))
        self.lora_index = nn.Parameter(new(8))
        self.weight_u_top, self.weight_vt_top = nn.Parameter(new(n, 8)), nn.Parameter(new(8, k))
        nn.init.kaiming_uniform_(self.lora_A, a=5**0.5)

    def parts(self) -> tuple[Tensor, ...]:
        return self.lora_A, self.lora_B, self.lora_index, self.weight_u_top, self.weight_vt_top

    def keep(self, u: Tensor, vt: Tensor, sigma: Tensor, change: Tensor) -> None:
        self.weight_u_top.data, self.weight_vt_top.data = u, vt
        self.lora_change_a, self.lora_change_bb = nn.Parameter(sigma), nn.Parameter(change)

    def forward(self, x: Tensor) -> Tensor:
        for frozen in (self.weight_u_top, self.weight_vt_top):
            frozen.requires_grad = False
        return self.respond(x)


class CrMrLinear(_Restated, nn.Linear):
    def __init__(
        self, k, n, r, lora_alpha=1, lora_dropout=0.0, fan_in_fan_out=False, merge_weights=True, **options
    ) -> None:
        nn.Linear.__init__(self, k, n, **options)
        self.note(r, lora_alpha, lora_dropout, fan_in_fan_out, merge_weights)
        self.disable_adapters = False
        self.lora_A, self.lora_B = nn.Linear(k, r, bias=False), nn.Linear(r, n, bias=False)
        self.lora_index = nn.Linear(8, 1, bias=False)
        self.lora_w_u, self.lora_w_vt = nn.Parameter(torch.zeros(n, 8)), nn.Parameter(torch.zeros(8, k))
        nn.init.zeros_(self.lora_B.weight)
        nn.init.zeros_(self.lora_index.weight)

    def parts(self) -> tuple[Tensor, ...]:
        return self.lora_A.weight, self.lora_B.weight, self.lora_index.weight, self.lora_w_u, self.lora_w_vt

    def keep(self, u: Tensor, vt: Tensor, sigma: Tensor, change: Tensor) -> None:
        self.lora_w_u, self.lora_w_vt = (nn.Parameter(t, requires_grad=False) for t in (u, vt))

    def train(self, mode: bool = True) -> CrMrLinear:
        nn.Module.train(self, mode)
        if not mode and self.merge_weights and not self.merged:
            a, b, index, u, vt = self.parts()
            self.weight.data += (self.scaling * (b @ a) + u @ index.reshape(-1).diag() @ vt).detach()
            self.merged = True
        return self

    def forward(self, x: Tensor) -> Tensor:
        return self.base_output(x) if self.merged else self.respond(x)


class SdgLinear(_Restated):
    def __init__(
        self, base_layer, adapter_name, r, lora_alpha=1, lora_dropout=0.0, lora_use_dash=True, **_: Any
    ) -> None:
        super().__init__()
        base_layer.requires_grad_(False)
        k, n = base_layer.in_features, base_layer.out_features
        self.base_layer, self.active_adapters, self.fan_in_fan_out = base_layer, [adapter_name], False
        self.r, self.lora_alpha, self.scaling = ({adapter_name: v} for v in (r, lora_alpha, lora_alpha / r))
        self.use_dora, self.lora_use_dash = {adapter_name: False}, {adapter_name: lora_use_dash}
        self.merged = self.disable_adapters = False
        self.count()
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

    def parts(self) -> tuple[Tensor, ...]:
        (name,) = self.active_adapters
        weights = (self.lora_A[name].weight, self.lora_B[name].weight, self.lora_index[name].weight)
        return *weights, self.lora_w_u[name], self.lora_w_vt[name]

    def keep(self, u: Tensor, vt: Tensor, sigma: Tensor, change: Tensor) -> None:
        (name,) = self.active_adapters
        self.lora_w_u[name], self.lora_w_vt[name] = (nn.Parameter(t, requires_grad=False) for t in (u, vt))

    def base_output(self, x: Tensor) -> Tensor:
        return self.base_layer(x)

    def setting(self) -> tuple[Tensor, float, Callable[[Tensor], Tensor]]:
        (name,) = self.active_adapters
        return self.base_layer.weight, self.scaling[name], self.lora_dropout[name]

    def forward(self, x: Tensor) -> Tensor:
        return self.base_output(x) if self.merged or self.disable_adapters else self.respond(x)


RESTATED = {"loralib": LoralibLinear, "cr_mr": CrMrLinear, "sdg": SdgLinear}
for _cls in RESTATED.values():
    # By this name they are told apart from others.
    _cls.__name__ = "Linear"


class AuthorsLinear(LoralibLinear):
    """loralib's around a layer's own weight, in its dtype, for what a step costs. Its directions are given to it: the SVD that
    their forward takes at launch is the price of one step."""

    def __init__(self, linear: nn.Linear, r: int, s: int, scaling: float, dropout: float) -> None:
        n, k = linear.weight.shape
        super().__init__(k, n, r, scaling * r, dropout, bias=linear.bias is not None, dtype=linear.weight.dtype)
        if s != self.index:
            raise ValueError(f"the authors' classes have {self.index} directions, got s = {s}")
        self.weight, self.bias = linear.weight, linear.bias
        for frozen in (self.weight, self.bias):
            if frozen is not None:
                frozen.requires_grad_(False)
        # Launch is brought about, not waited for.
        self.warmup = 1 << 30

    @property
    def lora_a(self) -> Tensor:
        return self.lora_A

    @property
    def lora_b(self) -> Tensor:
        return self.lora_B

    @property
    def dash_sigma(self) -> Tensor:
        return self.lora_index

    @torch.no_grad()
    def launch(self, directions: Directions) -> None:
        self.weight_u_top.copy_(directions.u)
        self.weight_vt_top.copy_(directions.vt)
        self.FLAG = self.warmup + 1


def _module(name: str, file: Path, **stand_ins: Mapping[str, Any]) -> Any:
    """A file of theirs as a module of a package of ours, beside modules that stand in for those it imports from there."""
    if f"authors.{name}" in sys.modules:
        return sys.modules[f"authors.{name}"]
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


def _utils() -> dict[str, Any]:
    @dataclass
    class PeftConfig:
        inference_mode: bool = False

    return {
        "PeftConfig": PeftConfig,
        "PeftType": types.SimpleNamespace(LORA="LORA"),
        "transpose": lambda weight, fan_in_fan_out: weight.T if fan_in_fan_out else weight,
    }


def _theirs(dialect: str) -> Any:
    if CLONE is None:
        raise NoClone("LORADASH_AUTHORS names no clone of the authors' repository")
    file = Path(CLONE) / FILES[dialect]
    if dialect == "loralib":
        # It imports the name with capitals; the tree has it without.
        _module("loralib.layers_LoRA", file.with_name("layers_lora.py"))
        return _module("loralib.layers", file).Linear
    if dialect == "cr_mr":
        return _module("cr_mr.tuners.lora", file, **{"cr_mr.utils": _utils()}).Linear
    return _module("sdg.lora.layer", file, **{"sdg.lora.config": {"LoraConfig": object}}).Linear


def make_layer(dialect, source, k, n, r=4, alpha=8, dropout=0.0, warmup=100, **options) -> Any:
    """A layer of theirs, of whichever dialect: restated, or from their own file. Raises NoClone where there is none."""
    cls = RESTATED[dialect] if source == "restated" else _theirs(dialect)
    if dialect == "sdg":
        base = nn.Linear(k, n, **options).requires_grad_(False)
        layer = cls(base, "default", r, alpha, dropout, lora_use_dash=True)
    else:
        layer = cls(k, n, r, alpha, dropout, **options)
    layer.warmup = warmup
    return layer


def make_model(dialect, source, widths=(24, 32, 16), seed=0, **settings) -> nn.Sequential:
    """Layers of theirs in a row with a nonlinearity between, biases frozen as by their `mark_only_lora_as_trainable`."""
    torch.manual_seed(seed)
    layers = [make_layer(dialect, source, k, n, **settings) for k, n in itertools.pairwise(widths)]
    model = nn.Sequential(*[m for layer in layers for m in (layer, nn.Tanh())][:-1])
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name and "lora_w" not in name)
    return model
