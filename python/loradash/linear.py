"""`DashLinear`: nn.Linear with LoRA-Dash adapters."""

from __future__ import annotations

from typing import Any, NoReturn, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from loradash_kernels import Directions, dash_linear, low_rank_update
from loradash_kernels.rows import dash_linear_rows, low_rank_update_rows

from . import zero
from .base_layers import features, is_transposed, treatment
from .config import DashConfig
from .distributed import assign, gathered, shard_of
from .formats import keep_differentiable
from .parked import DEFAULT, HasAdapters, MixedRows, adapter_shapes, new_parts, watch_backward
from .quantised import check_differentiable, compute_device, is_quantised
from .units import as_declared


@torch.no_grad()
def take_directions(layer: Any, directions: Directions) -> None:
    """What launching an adapted layer is, whoever made it (`loradash.state.AdaptedLayer`); ValueError, and no change, where
    that cannot be."""
    label = layer.name or type(layer).__name__
    for name, ours, theirs in (("u", layer.dash_u, directions.u), ("vt", layer.dash_vt, directions.vt)):
        if ours.shape != theirs.shape:
            raise ValueError(f"directions.{name} has shape {tuple(theirs.shape)}; wanted {tuple(ours.shape)}")
    if layer.merged:
        raise ValueError(f"{label} is merged; unmerge it before launch")
    if bool(layer.launched) and bool(gathered(layer.dash_sigma).any()):
        raise ValueError(f"{label} is launched, and its trained dash_sigma would be lost; zero it to launch anew")
    layer.dash_u.copy_(shard_of(directions.u, layer.dash_u))
    layer.dash_vt.copy_(shard_of(directions.vt, layer.dash_vt))
    if zero.is_trained_by_zero(layer.dash_sigma):
        assign(layer.dash_sigma, torch.zeros(zero.whole_shape(layer.dash_sigma)))
    else:
        layer.dash_sigma.zero_()
    layer.launched.fill_(True)


class DashLinear(HasAdapters):
    """A linear layer with frozen weight and LoRA-Dash adapters (Si et al., ICLR 2025); drop-in for nn.Linear.

    y = x Wᵀ + b + scaling · x̃ Aᵀ Bᵀ + Σ_i Δσ_i (x̃ · v_i) u_iᵀ. Until `launch`, u and v are zero and the layer is LoRA.

    Parameters: weight (N, K) frozen, bias (N) frozen unless config.train_bias, lora_a (r, K), lora_b (N, r), dash_sigma
    (s). Buffers: dash_u (N, s), dash_vt (s, K), launched (). Adapters are float32 whatever the dtype of the weight.
    A layer that computes in a way of its own (quantised, a subclass of nn.Linear, hooked, offloaded) is kept whole: as the
    submodule `base` it takes the place of weight and bias, and answers for them.

    Args:
        in_features, out_features: K and N.
        bias: with a bias?
        config: settings of this layer; `config.overrides` are not looked at.
        device, dtype: of the weight and bias.

    Attributes:
        name: the layer's name in the model, for error messages; empty outside `apply_dash`.
        enabled: False leaves the base layer alone.
        adopted: the class of the layer that gave its weight and bias; None for one that is kept whole.
        group: the layers that it is computed with (`grouping`), or None.
    """

    group: Any = None

    bias: Tensor | None
    launched: Tensor
    # Sizes that the weight has beside (N, K).
    unit_kernel: tuple[int, ...] = ()
    _treatment = staticmethod(treatment)

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
        self._wrap(nn.Linear(in_features, out_features, bias, device=device, dtype=dtype), config or DashConfig())
        self.freeze_base()

    @classmethod
    def from_linear(cls, linear: nn.Module, config: DashConfig | None = None) -> DashLinear:
        """Wraps a layer's own weight and bias, without a copy: nn.Linear, or transformers' Conv1D (weight (K, N)).

        A layer that computes in a way of its own (`base_layers.treatment`) is kept whole: the low-rank terms are added to its
        output. Raises TypeError for other modules; ValueError for a layer without a weight yet, for a sharded one, and for
        config.train_bias with one that is kept whole.
        """
        layer = cls.around(linear, config or DashConfig())
        layer.freeze_base()
        return layer

    @classmethod
    def around(cls, linear: nn.Module, config: DashConfig) -> DashLinear:
        """`from_linear` without the change to `linear`: its parameters train as before, until `freeze_base`."""
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer._wrap(linear, config)
        return layer.train(linear.training)

    def _wrap(self, linear: nn.Module, config: DashConfig) -> None:
        kept = self._treatment(linear) == "kept whole"
        self.base = None
        if kept and config.train_bias and getattr(linear, "bias", None) is not None:
            raise ValueError(f"train_bias=True: the bias of {type(linear).__name__} belongs to the layer kept whole")
        self.transposed = is_transposed(linear) and not kept
        self.in_features, self.out_features = features(linear)
        self.config, self.name, self.enabled = config, "", True
        self.adapter = DEFAULT
        self.adopted = None if kept else type(linear)
        self._keep(None)
        if not kept:
            self.register_parameter("weight", cast(nn.Parameter, linear.weight))
            self.register_parameter("bias", cast("nn.Parameter | None", linear.bias))
        new_parts(self, self.out_features, self.in_features, config, compute_device(linear))
        if kept:
            # This comes last: from here on the base layer answers for names that are not ours.
            self.base = linear
        else:
            self.__dict__.update({key: value for key, value in vars(linear).items() if key not in self.__dict__})

    def shapes(self, config: DashConfig) -> dict[str, tuple[int, ...]]:
        """Shapes of the adapter's tensors for these settings, by name."""
        return adapter_shapes(self.out_features, self.in_features, config)

    def freeze_base(self) -> None:
        """Freezes the base layer, but for a bias that `config.train_bias` wants trained."""
        if self.base is not None:
            self.base.requires_grad_(False)
            keep_differentiable(self.base)
            return
        self.weight.requires_grad_(False)
        if self.bias is not None:
            self.bias.requires_grad_(self.config.train_bias)

    def __getattr__(self, name: str) -> Any:
        base = self.__dict__["_modules"].get("base") if not name.startswith("_") and name != "base" else None
        if base is None:
            return super().__getattr__(name)
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(base, name)

    def __setattr__(self, name: str, value: Any) -> None:
        """Code that ties or replaces `weight` or `bias`, or sets what only the base layer has, means the base layer's."""
        base = self.__dict__.get("_modules", {}).get("base")
        if name == "weight" and value is not None and value is self.__dict__.get("_unmerged"):
            raise ValueError(f"{self._label()} is merged, and would lose its update; unmerge(model) before tying")
        if base is not None and (name in ("weight", "bias") or self._is_of_base(name, base)):
            setattr(base, name, value)
        else:
            super().__setattr__(name, value)

    def _is_of_base(self, name: str, base: nn.Module) -> bool:
        if name.startswith("_") or hasattr(type(self), name) or not hasattr(base, name):
            return False
        return not any(name in own for own in (self.__dict__, self._parameters, self._buffers, self._modules))

    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """input (..., K) to (..., N). Further arguments are for a layer kept whole; TypeError where there is none."""
        base = self.base
        if base is not None:
            return self._add_low_rank(self._called(base, input, args, kwargs), input)
        if args or kwargs:
            raise TypeError(f"{self._label()} takes one tensor, got further arguments {[*args, *kwargs]}")
        if self.group is not None:
            y = self.group.output(self, input)
            if y is not None:
                return y
        weight, bias, lora_a, lora_b, dash_u, dash_vt, dash_sigma = self._tensors()
        if weight.requires_grad:
            weight, bias = as_declared(self, "weight", weight), as_declared(self, "bias", bias)
        weight = weight.t() if self.transposed else weight
        if not self.enabled or self._unmerged is not None:
            return F.linear(input, weight, bias)
        rows = self._mixed_rows
        if rows is not None:
            return self._mixed(rows, None, input, weight, bias)
        if lora_a is None:
            return F.linear(input, weight, bias)
        # Somebody may have quantised the weight since `apply_dash`.
        if type(weight) not in (nn.Parameter, Tensor) and is_quantised(weight):
            return self._add_low_rank(F.linear(input, weight, bias), input)
        config = self.config
        try:
            return dash_linear(
                input,
                weight,
                bias,
                lora_a=lora_a,
                lora_b=lora_b,
                dash_u=dash_u,
                dash_vt=dash_vt,
                dash_sigma=dash_sigma,
                scaling=config.scaling,
                dropout_p=config.dropout,
                training=self.training,
            )
        except ValueError as error:
            self._fail(error, weight)

    def _tensors(self) -> tuple[Any, ...]:
        """weight, bias, A, B, U, Vᵀ, Δσ: from the module's dicts, a tenth of the price of attributes, where all are there.

        Replicas of DataParallel, FSDP1, pruning and parametrizations keep them as plain attributes.
        """
        own, buffers = self._parameters, self._buffers
        try:
            weight, bias = own["weight"], own["bias"]
            a, b, sigma = own["lora_a"], own["lora_b"], own["dash_sigma"]
            return weight, bias, a, b, buffers["dash_u"], buffers["dash_vt"], sigma
        except KeyError:
            if self.adapter is None:
                return self.weight, self.bias, None, None, None, None, None
            return self.weight, self.bias, self.lora_a, self.lora_b, self.dash_u, self.dash_vt, self.dash_sigma

    def _called(self, base: nn.Module, x: Tensor, args: tuple, kwargs: dict[str, Any]) -> Tensor:
        y = base(x, *args, **kwargs)
        if not isinstance(y, Tensor) or y.shape != (*x.shape[:-1], self.out_features):
            found = tuple(y.shape) if isinstance(y, Tensor) else type(y).__name__
            raise TypeError(
                f"{self._label()}: {type(base).__name__} returned {found} for x {tuple(x.shape)}; only a tensor "
                f"(..., {self.out_features}) can take the low-rank terms; leave the layer out (exclude_modules)"
            )
        check_differentiable(self._label(), base, x, y)
        return y

    def _add_low_rank(self, y: Tensor, x: Tensor) -> Tensor:
        if not self.enabled or self._unmerged is not None:
            return y
        # The result is what the base layer alone would give, in dtype too.
        if x.dtype != y.dtype and x.is_floating_point() and y.is_floating_point():
            x = x.to(y.dtype)
        rows = self._mixed_rows
        if rows is not None:
            return self._mixed(rows, y, x, None, None)
        if self.adapter is None:
            return y
        try:
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
        except ValueError as error:
            self._fail(error, None)

    def _mixed(
        self, rows: MixedRows, y: Tensor | None, x: Tensor, weight: Tensor | None, bias: Tensor | None
    ) -> Tensor:
        """A mixed batch: beside y, the output of a layer kept whole, or beside the product with the weight."""
        options: dict[str, Any] = {
            "adapters": self.kernel_adapters(rows),
            "rows": rows.groups,
            "training": self.training,
        }
        try:
            if weight is None or (type(weight) not in (nn.Parameter, Tensor) and is_quantised(weight)):
                y = F.linear(x, cast(Tensor, weight), bias) if y is None else y
                out = low_rank_update_rows(y, x, **options)
            else:
                out = dash_linear_rows(x, weight, bias, **options)
        except ValueError as error:
            self._fail(error, weight)
        return watch_backward(self, rows, out)

    def _fail(self, error: ValueError, weight: Tensor | None) -> NoReturn:
        hint = ""
        if weight is not None and weight.shape != (self.out_features, self.in_features):
            hint = (
                f": the weight has shape {tuple(weight.shape)}, the adapter was made for "
                f"{(self.out_features, self.in_features)}; resize embeddings before apply_dash"
            )
        raise ValueError(f"{self._label()}: {error}{hint}") from error

    @torch.no_grad()
    def launch(self, directions: Directions) -> None:
        """Takes the task-specific directions, u (N, s) and vt (s, K), and starts their coordinates Δσ at zero.

        Raises ValueError where shapes do not fit, for a merged layer, and where trained Δσ would be lost; the layer is
        then unchanged.
        """
        take_directions(self, directions)

    def extra_repr(self) -> str:
        if self.adapter is None:
            return f"in_features={self.in_features}, out_features={self.out_features}, without the active adapter"
        phase = "on meta" if self.launched.is_meta else "dash" if bool(self.launched) else "pre-launch"
        bias = getattr(self, "bias", None) is not None
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={bias}, "
            f"r={self.config.r}, directions={self.dash_vt.shape[0]}, phase={phase}"
            + (f", adapters={', '.join(self.adapters)}" if len(self.adapters) > 1 else "")
        )
