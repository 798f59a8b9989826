"""`DashLinear`: nn.Linear with LoRA-Dash adapters."""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from loradash_kernels import Directions, dash_linear, low_rank_update

from .base import dequantised, is_quantised
from .config import DashConfig


class DashLinear(nn.Module):
    """A linear layer with frozen weight and LoRA-Dash adapters (Si et al., ICLR 2025); drop-in for nn.Linear.

    y = x Wᵀ + b + scaling · x̃ Aᵀ Bᵀ + Σ_i Δσ_i (x̃ · v_i) u_iᵀ. Until `launch`, u and v are zero and the layer is LoRA.

    Parameters: weight (N, K) frozen, bias (N) frozen unless config.train_bias, lora_a (r, K), lora_b (N, r), dash_sigma
    (s). Buffers: dash_u (N, s), dash_vt (s, K), launched (). Adapters are float32 whatever the dtype of the weight. Around
    a quantised layer (bitsandbytes, torchao), that layer itself as the submodule `base` takes the place of weight and bias.

    Args:
        in_features, out_features: K and N.
        bias: with a bias?
        config: settings; those of `config.for_module` are the caller's business.
        device, dtype: of the weight and bias.
    """

    weight: Tensor
    bias: Tensor | None
    base: nn.Module | None
    dash_u: Tensor
    dash_vt: Tensor
    launched: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        config: DashConfig | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        linear = nn.Linear(in_features, out_features, bias, device=device, dtype=dtype)
        self._adopt(linear.weight, linear.bias, config or DashConfig(), transposed=False)

    @classmethod
    def from_linear(cls, linear: nn.Module, config: DashConfig | None = None) -> DashLinear:
        """Wraps a layer's own weight and bias, without a copy: nn.Linear, or transformers' Conv1D (weight (K, N)).

        Linear modules with quantised weights are kept whole, and the low-rank terms added to their output.
        Raises TypeError for other modules, ValueError for config.train_bias with a quantised one.
        """
        transposed = type(linear).__name__ == "Conv1D" and not isinstance(linear, nn.Linear)
        if not (isinstance(linear, nn.Linear) or transposed):
            raise TypeError(f"from_linear takes nn.Linear or transformers' Conv1D, got {type(linear).__name__}")
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        if is_quantised(linear):
            layer._keep(linear, config or DashConfig())
            layer.train(linear.training)
            return layer
        weight, bias = cast(Tensor, linear.weight), cast("Tensor | None", linear.bias)
        layer._adopt(weight, bias, config or DashConfig(), transposed)
        layer.train(linear.training)
        return layer

    def _adopt(self, weight: Tensor, bias: Tensor | None, config: DashConfig, transposed: bool) -> None:
        n, k = weight.shape[::-1] if transposed else weight.shape
        self.base, self.transposed = None, transposed
        self.weight = weight
        self.weight.requires_grad_(False)
        self.register_parameter("bias", bias)  # type: ignore[arg-type]
        if bias is not None:
            bias.requires_grad_(config.train_bias)
        self._add_adapters(k, n, config, weight.device)

    def _keep(self, base: nn.Module, config: DashConfig) -> None:
        if config.train_bias and getattr(base, "bias", None) is not None:
            raise ValueError(f"train_bias=True: the bias of {type(base).__name__} belongs to the quantised layer")
        self.base, self.transposed = base.requires_grad_(False), False
        self.register_parameter("bias", None)
        self._add_adapters(base.in_features, base.out_features, config, base.weight.device)  # type: ignore[arg-type]

    def _add_adapters(self, k: int, n: int, config: DashConfig, device: torch.device) -> None:
        s = min(config.directions, n, k)
        self.in_features, self.out_features, self.config = k, n, config
        options: Any = {"device": device, "dtype": torch.float32}
        self.lora_a = nn.Parameter(torch.empty(config.r, k, **options))
        self.lora_b = nn.Parameter(torch.zeros(n, config.r, **options))
        self.dash_sigma = nn.Parameter(torch.zeros(s, **options))
        self.register_buffer("dash_u", torch.zeros(n, s, **options))
        self.register_buffer("dash_vt", torch.zeros(s, k, **options))
        self.register_buffer("launched", torch.zeros((), dtype=torch.bool, device=device))
        nn.init.kaiming_uniform_(self.lora_a, a=math.sqrt(5))
        self.enabled = True
        self._unmerged: Tensor | None = None  # the weight before `merge`
        self._view: Tensor | None = None

    @property
    def scaling(self) -> float:
        return self.config.scaling

    @property
    def merged(self) -> bool:
        return self._unmerged is not None

    def weight_nk(self) -> Tensor:
        """The weight as (N, K). One view object as long as the memory stays: packed copies are kept per tensor. Of a
        quantised layer, a new tensor in the precision it computes in, with every call."""
        if self.base is not None:
            return dequantised(self.base, self.in_features, torch.float32, self.lora_a.device)
        if not self.transposed:
            return self.weight
        if (
            self._view is None
            or self._view.data_ptr() != self.weight.data_ptr()
            or self._view.dtype != self.weight.dtype
        ):
            self._view = self.weight.detach().t()
        return self._view

    def oriented(self, weight: Tensor) -> Tensor:
        """A tensor of the stored weight's shape as (N, K)."""
        return weight.t() if self.transposed else weight

    def forward(self, x: Tensor) -> Tensor:
        """x (..., K) to (..., N)."""
        if self.base is not None:
            return self._forward_over(self.base, x)
        if not self.enabled or self._unmerged is not None:
            return F.linear(x, self.weight_nk(), self.bias)
        own, buffers, config = self._parameters, self._buffers, self.config  # a lookup by attribute costs 0.5 us
        return dash_linear(
            x,
            self.weight_nk() if self.transposed else own["weight"],  # type: ignore[arg-type]
            own["bias"],
            lora_a=own["lora_a"],  # type: ignore[arg-type]
            lora_b=own["lora_b"],  # type: ignore[arg-type]
            dash_u=buffers["dash_u"],
            dash_vt=buffers["dash_vt"],
            dash_sigma=own["dash_sigma"],
            scaling=config.scaling,
            dropout_p=config.dropout,
            training=self.training,
        )

    def _forward_over(self, base: nn.Module, x: Tensor) -> Tensor:
        y = base(x)
        if not self.enabled:
            return y
        return low_rank_update(
            y,
            x,
            lora_a=self.lora_a,
            lora_b=self.lora_b,
            dash_u=self.dash_u,
            dash_vt=self.dash_vt,
            dash_sigma=self.dash_sigma,
            scaling=self.scaling,
            dropout_p=self.config.dropout,
            training=self.training,
        )

    @torch.no_grad()
    def launch(self, directions: Directions) -> None:
        """Takes the task-specific directions, u (N, s) and vt (s, K), and starts their coordinates Δσ at zero.

        Raises ValueError where shapes do not fit; the layer is then unchanged.
        """
        for name, ours, theirs in (("u", self.dash_u, directions.u), ("vt", self.dash_vt, directions.vt)):
            if ours.shape != theirs.shape:
                raise ValueError(f"directions.{name} has shape {tuple(theirs.shape)}; wanted {tuple(ours.shape)}")
        self.dash_u.copy_(directions.u)
        self.dash_vt.copy_(directions.vt)
        self.dash_sigma.zero_()
        self.launched.fill_(True)

    @torch.no_grad()
    def delta(self) -> Tensor:
        """ΔW (N, K) in float32: scaling · B A + U diag(Δσ) Vᵀ."""
        return self.scaling * (self.lora_b @ self.lora_a) + (self.dash_u * self.dash_sigma) @ self.dash_vt

    @torch.no_grad()
    def merge(self) -> None:
        """Adds ΔW to the weight, as a new tensor: weights tied to this one stay as they are. Again: no effect.

        Raises ValueError for a quantised layer, whose weight has no room for ΔW.
        """
        if self.base is not None:
            raise ValueError(
                f"{type(self.base).__name__} is quantised and cannot take the update; serve it beside the model: "
                "export_lora(model, path)"
            )
        if self._unmerged is not None:
            return
        delta = self.delta()
        merged = self.weight.float() + (delta.t() if self.transposed else delta)
        self._unmerged = self.weight
        self.weight = nn.Parameter(merged.to(self.weight.dtype), requires_grad=False)

    def unmerge(self) -> None:
        """Puts the original weight back, bit for bit. Without `merge`: no effect."""
        if self._unmerged is not None:
            self.weight = self._unmerged
            self._unmerged = None

    def extra_repr(self) -> str:
        phase = "dash" if bool(self.launched) else "pre-launch"
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"r={self.config.r}, directions={self.dash_sigma.numel()}, phase={phase}"
        )
