"""PEFT's LoRA layers with the dash term: the forward pass is ours, all else PEFT's."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BufferDict
from torch import Tensor, nn
from torch.nn import functional as F

from loradash.distributed import gathered
from loradash.quantised import check_differentiable

from .config import DashLoraConfig
from .fused import Term, base_refusal, beside_base, parts_refusal, refusal, with_base
from .merging import Mergeable
from .views import host_of

FROZEN = ("lora_dash_u", "lora_dash_vt", "lora_dash_launched", "lora_dash_step")
"""Dicts of buffers by adapter: U (N, s), Vᵀ (s, K), the phase (bool) and the step (int64)."""

_PREFIX = "Dash"


class DashLoraLayer(Mergeable, LoraLayer):
    """What makes one of PEFT's LoRA layers over a linear base a LORADASH layer.

    y = base(x) + Σ over active adapters of [scaling · x̃ Aᵀ Bᵀ + Σ_i Δσ_i (x̃ · v_i) u_iᵀ], x̃ = dropout(x). A scale that is set on
    an adapter (`set_scale`, `scale_layer`) is one of both its terms.

    Attributes:
        lora_dash_sigma: Δσ (s,) by adapter, trained. The names in FROZEN: buffers by adapter.
    """

    lora_A: Any
    lora_B: Any
    lora_dropout: Any
    scaling: dict[str, Any]
    in_features: int
    out_features: int
    lora_dash_sigma: nn.ParameterDict
    lora_dash_u: Any
    lora_dash_vt: Any
    lora_dash_launched: Any
    lora_dash_step: Any

    adapter_layer_names = (*LoraLayer.adapter_layer_names, "lora_dash_sigma")
    other_param_names = (*LoraLayer.other_param_names, *FROZEN)

    _loradash_host = staticmethod(host_of)
    # DistributedDataParallel need not send them: every process counts and launches for itself, and finds the same.
    _loradash_frozen = FROZEN

    def update_layer(  # type: ignore[override]
        self, adapter_name: str, r: int, lora_alpha: int, config: DashLoraConfig, **kwargs: Any
    ) -> None:
        """PEFT's call for one more adapter on this layer."""
        super().update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config, **kwargs)
        self.add_dash_term(adapter_name, config)

    def add_dash_term(self, adapter_name: str, config: DashLoraConfig) -> None:
        """Δσ, U and Vᵀ, all zero, beside an adapter's A and B."""
        if "lora_dash_sigma" not in self._modules:
            self.lora_dash_sigma = nn.ParameterDict()
            for name in FROZEN:
                setattr(self, name, BufferDict(persistent=True))
            self._untrained: dict[str, int] = {}
            self.register_load_state_dict_post_hook(_note_loaded)
        n, k = self.out_features, self.in_features
        s = min(config.directions, n, k)
        like = self.lora_A[adapter_name].weight
        device = self._get_base_layer_device_and_dtype(self.get_base_layer())[0]
        # 16 bits are too few for unit vectors that are kept as they are.
        wide = torch.float64 if like.dtype == torch.float64 else torch.float32
        self.lora_dash_sigma[adapter_name] = nn.Parameter(torch.zeros(s, dtype=like.dtype, device=like.device))
        self.lora_dash_u[adapter_name] = torch.zeros(n, s, dtype=wide, device=device)
        self.lora_dash_vt[adapter_name] = torch.zeros(s, k, dtype=wide, device=device)
        self.lora_dash_launched[adapter_name] = torch.zeros((), dtype=torch.bool, device=device)
        self.lora_dash_step[adapter_name] = torch.zeros((), dtype=torch.int64, device=device)
        # Says of the new parameter too whether it trains.
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)
        self.note_untrained(adapter_name)

    def note_untrained(self, adapter: str) -> None:
        """B was made, loaded or computed just now: what it holds is not of a training that nobody counted."""
        b = self.lora_B[adapter].weight
        # Tensors made under torch.inference_mode count no writes, and are never trained.
        self._untrained[adapter] = 0 if b.is_inference() else b._version

    def is_plain_lora_by_mistake(self, adapter: str) -> bool:
        """Was B written since, as an optimizer does, while no step was counted and no direction launched?"""
        b = self.lora_B[adapter].weight
        written = b.requires_grad and not b.is_inference() and b._version > self._untrained[adapter]
        if not written or not self.lora_dash_sigma[adapter].numel():
            return False
        return not self.lora_dash_step[adapter] and not self.lora_dash_launched[adapter]

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """PEFT's, which casts what it moves to the base layer's dtype: the vectors, the phase and the step keep theirs, and
        Δσ stays frozen where it was."""
        present = "lora_dash_sigma" in self._modules and adapter_name in self.lora_dash_sigma
        kept = {name: getattr(self, name)[adapter_name] for name in FROZEN} if present else {}
        trains = present and self.lora_dash_sigma[adapter_name].requires_grad
        super()._move_adapter_to_device_of_base_layer(adapter_name, device)
        for name, tensor in kept.items():
            moved = getattr(self, name)[adapter_name]
            getattr(self, name)[adapter_name] = tensor if tensor.is_meta else tensor.to(moved.device)
        if present:
            self.lora_dash_sigma[adapter_name].requires_grad_(trains)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """x (..., K) to (..., N). `adapter_names`: one name for each row of a mixed batch; all else is the base layer's."""
        self._check_forward_args(x, *args, **kwargs)
        adapter_names = kwargs.pop("adapter_names", None)
        if kwargs.pop("alora_offsets", None) is not None:
            raise ValueError("alora_offsets are for aLoRA, and this adapter is LoRA-Dash")
        if self.disable_adapters and self.merged:
            self.unmerge()
        if self.disable_adapters or (self.merged and adapter_names is None):
            return self.base_layer(x, *args, **kwargs)
        if adapter_names is not None:
            return self._mixed_batch_forward(x, *args, adapter_names=adapter_names, **kwargs)
        adapters = [name for name in self.active_adapters if name in self.lora_A]
        terms = self._fusible_terms(x, adapters)
        base = self._modules["base_layer"]
        if terms and not args and not kwargs and base_refusal(x, base) is None:  # type: ignore[arg-type]
            return with_base(x, base, terms)  # type: ignore[arg-type]
        y = self._base_output(x, *args, **kwargs)
        return self._added(y, x, adapters) if terms is None else beside_base(y, x, terms)

    def _base_output(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        y = self.base_layer(x, *args, **kwargs)
        check_differentiable(type(self).__name__, self.get_base_layer(), x, y)
        return y

    def _mixed_batch_forward(self, x: Tensor, *args: Any, adapter_names: Sequence[str], **kwargs: Any) -> Tensor:
        y = self._base_output(x, *args, **kwargs)
        for adapter in dict.fromkeys(adapter_names):
            # The name "__base__" stands for none, and a layer need not have every adapter.
            if adapter not in self.lora_A:
                continue
            rows = torch.tensor([i for i, name in enumerate(adapter_names) if name == adapter], device=y.device)
            y = y.index_copy(0, rows, self._updated(y[rows], x[rows], [adapter]))
        return y

    def _updated(self, y: Tensor, x: Tensor, adapters: Sequence[str]) -> Tensor:
        """The base layer's output y for x, with the terms of adapters."""
        terms = self._fusible_terms(x, adapters)
        return self._added(y, x, adapters) if terms is None else beside_base(y, x, terms)

    def _added(self, y: Tensor, x: Tensor, adapters: Sequence[str]) -> Tensor:
        """The same as a chain of PyTorch's operators, which serves hooks on A and B, tensors of any kind and any dtypes."""
        dtype = y.dtype
        for name in adapters:
            lora_a, lora_b = self.lora_A[name], self.lora_B[name]
            dropped = self.lora_dropout[name](self._cast_input_dtype(x, lora_a.weight.dtype))
            y = y + lora_b(lora_a(dropped)) * self.scaling[name]
            u, vt = self.lora_dash_u[name].to(dropped.dtype), self.lora_dash_vt[name].to(dropped.dtype)
            y = y + F.linear(F.linear(dropped, vt) * self._sigma(name).to(dropped.dtype), u)
        return y.to(dtype)

    def _fusible_terms(self, x: Tensor, adapters: Sequence[str]) -> list[Term] | None:
        """What kernels need of these adapters, or None where their modules must be called, or their tensors are of a kind that
        no kernel takes."""
        terms = []
        for name in adapters:
            term = self._term(name)
            if term is None:
                return None
            terms.append(term)
        return terms if refusal(x, terms, self.cast_input_dtype_enabled) is None else None

    def _term(self, name: str) -> Term | None:
        """The tensors of an adapter; None where its parts are not what PEFT made them, so that calling them gives more."""
        # PEFT's dicts are modules: by attributes this costs ten times as much, in every call of every layer.
        dicts: Any = self._modules
        lora_a, lora_b = dicts["lora_A"]._modules[name], dicts["lora_B"]._modules[name]
        dropout = dicts["lora_dropout"]._modules[name]
        if parts_refusal(lora_a, lora_b, dropout) is not None:
            return None
        a, b = lora_a._parameters, lora_b._parameters
        return Term(
            a["weight"],
            b["weight"],
            self.scaling[name],
            dropout.p if dropout.training and type(dropout) is nn.Dropout else 0.0,
            b["bias"],
            dicts["lora_dash_u"]._buffers[name],
            dicts["lora_dash_vt"]._buffers[name],
            self._sigma(name),
        )

    def _sigma(self, name: str) -> Tensor:
        """Δσ (s,) times the scale that was set on the adapter, beside the one that its settings give."""
        sigma, scaling = getattr(self._modules["lora_dash_sigma"], name), self.scaling[name]
        r, alpha = self.r[name], self.lora_alpha[name]
        initial = alpha / (math.sqrt(r) if self.use_rslora.get(name, False) else r)
        if not isinstance(scaling, Tensor) and scaling == initial:
            return sigma
        return sigma * (scaling / initial)

    @torch.no_grad()
    def folded(self, adapter: str) -> tuple[Tensor, Tensor]:
        """A (R, K) and B (N, R) of the whole update with a scaling of 1, R = r + s, in float32 or wider, gathered."""
        a, b = gathered(self.lora_A[adapter].weight), gathered(self.lora_B[adapter].weight)
        u, vt, sigma = self.lora_dash_u[adapter], self.lora_dash_vt[adapter], gathered(self._sigma(adapter))
        return torch.cat((a.to(vt.dtype), vt)), torch.cat((b.to(u.dtype) * self.scaling[adapter], u * sigma), 1)

    @torch.no_grad()
    def get_delta_weight(self, adapter: str) -> Tensor:
        """ΔW in the shape of the stored weight and the dtype of B: what PEFT's merging adds, for every kind of base layer."""
        a, b = self.folded(adapter)
        with torch.autocast(a.device.type, enabled=False):
            delta = b @ a
        delta = delta.t() if getattr(self, "fan_in_fan_out", False) else delta
        return delta.to(self.lora_B[adapter].weight.dtype)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return True

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        for adapter in self.lora_dash_sigma:
            wanted = [f"{prefix}{name}.{adapter}" for name in ("lora_dash_sigma", *FROZEN)]
            missing = [key for key in wanted if key not in state_dict]
            if missing and f"{prefix}lora_A.{adapter}.weight" in state_dict:
                raise ValueError(
                    f"not a whole LORADASH adapter: {missing[0]} is missing; loradash.integrations.peft.from_lora starts a run "
                    "from a plain LoRA"
                )
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


def _note_loaded(layer: DashLoraLayer, _: Any) -> None:
    for adapter in layer.lora_dash_sigma:
        layer.note_untrained(adapter)


class Linear(DashLoraLayer, LoraLinear):
    """Over nn.Linear and transformers' Conv1D."""


@functools.cache
def dash_class(kind: Any) -> type[DashLoraLayer]:
    """The class for one of PEFT's LoRA layers, as found in this module under its name: "Dash" and PEFT's."""
    if kind is LoraLinear:
        return Linear
    return type(f"{_PREFIX}{kind.__name__}", (DashLoraLayer, kind), {"__module__": __name__, "__doc__": kind.__doc__})


def __getattr__(name: str) -> Any:
    """Classes over PEFT's quantised layers, which pickles look for here."""
    if name.startswith(_PREFIX):
        for kind in _subclasses(LoraLayer):
            if kind.__name__ == name.removeprefix(_PREFIX) and not issubclass(kind, DashLoraLayer):
                return dash_class(kind)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _subclasses(kind: type) -> Iterator[Any]:
    child: Any
    for child in kind.__subclasses__():
        yield child
        yield from _subclasses(child)
