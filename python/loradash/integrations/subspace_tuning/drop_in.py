"""Drop-ins for the authors' `loralib`: `Linear` and the two functions that its users call."""

from __future__ import annotations

import math
from typing import Any, cast, get_args

import torch
from torch import Tensor, nn

from ...config import DashConfig
from ...state import STATE, plain_name
from .dialects import INDEX, KEYS, PARTS, WARMUP
from .kinds import DropInLayer, adopt
from .layers import Semantics
from .run import attach, settings_of_run

_BIASES = ("none", "all", "lora_only")


class Linear(nn.Linear):
    """The authors' `Linear` with LoRA-Dash, computed by our operator; r = 0 is nn.Linear.

    Parameters by their names: weight (N, K) frozen, or (K, N) with fan_in_fan_out; bias (N), which trains until
    `mark_only_lora_as_trainable`; lora_A (r, K), lora_B (N, r), lora_index (8); frozen, zero until launch: weight_u_top
    (N, 8), weight_vt_top (8, K), of which a layer with min(N, K) < 8 uses as many.

    Args:
        in_features, out_features: K and N.
        r: rank; 0 for none of this.
        lora_alpha: the LoRA term is scaled by lora_alpha / r.
        lora_dropout: probability on the input of the low-rank terms.
        fan_in_fan_out: is the weight stored as (K, N)?
        merge_weights: with "loradash", merge in eval and unmerge in train, bit for bit. State dicts hold the frozen weight
            in either. The authors' file takes the argument and does nothing with it, and so does "authors".
        semantics: "loradash" or "authors", see the table of this package.
        kwargs: those of nn.Linear: bias, device, dtype.

    Raises ValueError for a value out of range.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        r: int = 0,
        lora_alpha: float = 1,
        lora_dropout: float = 0.0,
        fan_in_fan_out: bool = False,
        merge_weights: bool = True,
        *,
        semantics: Semantics = "loradash",
        **kwargs: Any,
    ) -> None:
        if semantics not in get_args(Semantics):
            raise ValueError(f"semantics must be one of {get_args(Semantics)}, got {semantics!r}")
        if isinstance(r, bool) or not isinstance(r, int) or r < 0:
            raise ValueError(f"r must be an integer of at least 0, got {r!r}")
        if r > 0:
            _check(r, lora_alpha, lora_dropout)
        super().__init__(in_features, out_features, **kwargs)
        self.r, self.lora_alpha = r, lora_alpha
        self.lora_dropout = nn.Dropout(lora_dropout) if lora_dropout > 0 else nn.Identity()
        self.fan_in_fan_out, self.merge_weights = fan_in_fan_out, merge_weights
        if r > 0:
            self.scaling, self.index, self.warmup, self.FLAG = lora_alpha / r, INDEX, WARMUP, 0
            self.weight.requires_grad_(False)
            shapes = ((r, in_features), (out_features, r), (INDEX,), (out_features, INDEX), (INDEX, in_features))
            for part, shape in zip(PARTS, shapes, strict=True):
                self.register_parameter(KEYS["loralib"][part], nn.Parameter(self.weight.new_zeros(shape)))
            self._reset_adapter()
        if fan_in_fan_out:
            self.weight.data = self.weight.data.T
        if r > 0:
            adopt(self, DropInLayer, semantics)

    def reset_parameters(self) -> None:
        """Weight and bias as nn.Linear's, A as theirs (Kaiming), the rest zero, in the warm-up's first call."""
        super().reset_parameters()
        # nn.Linear asks for this before there is an adapter.
        if "lora_A" in self._parameters:
            self._reset_adapter()
            cast(DropInLayer, self).note_phase(False, 0)

    @torch.no_grad()
    def _reset_adapter(self) -> None:
        for part in PARTS:
            self._parameters[KEYS["loralib"][part]].zero_()  # type: ignore[union-attr]
        nn.init.kaiming_uniform_(cast(Tensor, self.lora_A), a=math.sqrt(5))

    def forward(self, input: Tensor) -> Tensor:
        """input (..., K) to (..., N), without an adapter."""
        return nn.functional.linear(input, self.weight.T if self.fan_in_fan_out else self.weight, self.bias)


def _check(r: int, lora_alpha: float, lora_dropout: float) -> None:
    try:
        DashConfig(r=r, alpha=lora_alpha, dropout=lora_dropout)
    except ValueError as error:
        # It begins with the name of the setting, which is that of the argument but for this.
        raise ValueError(f"lora_{error}") from None


def mark_only_lora_as_trainable(model: nn.Module, bias: str = "none") -> None:
    """As theirs: only parameters with "lora_" in their name train, and with bias="all" all biases, with "lora_only" those of
    layers with adapters. Beyond theirs it leaves on the model what `DashSchedule` and `save_adapter` need.

    Warns where bias="all" trains what `save_adapter` does not keep. Raises ValueError for another bias, and for a model
    without such layers.
    """
    if bias not in _BIASES:
        raise ValueError(f"bias must be one of {_BIASES}, got {bias!r}")
    layers = {plain_name(name): m for name, m in model.named_modules() if isinstance(m, DropInLayer)}
    if not layers:
        raise ValueError("the model has no Linear of this package with r > 0")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name or (bias == "all" and "bias" in name))
    for name, layer in layers.items():
        layer.name = name
        if bias == "lora_only" and layer.bias is not None:
            layer.bias.requires_grad_(True)
        layer.config = layer.settings()
    if STATE in model.__dict__:
        # Schedules hold this object.
        model.__dict__[STATE].config = settings_of_run(model, layers)
    else:
        attach(model, layers)


def lora_state_dict(model: nn.Module, bias: str = "none") -> dict[str, Tensor]:
    """As theirs, and with the directions, which theirs leaves out. Raises ValueError for another bias."""
    if bias not in _BIASES:
        raise ValueError(f"bias must be one of {_BIASES}, got {bias!r}")
    state = model.state_dict()
    kept = {k for k in state if "lora_" in k or k.rpartition(".")[2] in ("weight_u_top", "weight_vt_top")}
    if bias == "all":
        kept |= {k for k in state if "bias" in k}
    if bias == "lora_only":
        kept |= {k.split("lora_")[0] + "bias" for k in kept if "lora_" in k} & state.keys()
    return {key: value for key, value in state.items() if key in kept}
