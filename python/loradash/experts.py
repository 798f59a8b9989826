"""Experts of a mixture: their stacked parameters (E, N, K) with one adapter an expert.

transformers 5 keeps the experts of a layer in one module with parameters such as `gate_up_proj` and `down_proj`, which its
forward multiplies with itself. Adapting one makes the module's class a subclass of the one it had: its names, state dict,
hooks and isinstance stay, the adapters become parameters beside those they belong to, and forward sends all experts' rows
through `dash_experts`. Router, activation, gate, norms and routing weights are the module's own.

To schedule, files, merging and export an adapted parameter is one layer with a leading dimension (`ExpertParameter`), to
launch it is E matrices (`ExpertView`), which are decomposed together.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from loradash_kernels import Directions, dash_experts

from . import zero
from .config import DashConfig
from .distributed import assign, gathered, is_sharded
from .expert_modules import HOW, Kind, call_refusal, kind_of
from .linear import take_directions
from .parked import PARAMETERS, PARTS, adapter_shapes
from .units import as_declared

HANDLES = "_loradash_parameters"
"""The attribute of an experts module that holds its `ExpertParameter`s, by parameter name."""


class DashExperts(nn.Module):
    """An experts module with adapters: in front of the module's own class, `kind`, among the bases of the class it gets."""

    kind: type[nn.Module]
    _loradash_how: Kind

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """What the module's own forward takes and gives."""
        handles: dict[str, ExpertParameter] = self.__dict__[HANDLES]
        if not any(handle.active for handle in handles.values()):
            return self.kind.forward(self, *args, **kwargs)
        problem = call_refusal(self)
        if problem:
            raise ValueError(f"{next(iter(handles.values())).label()} {problem}")
        if kwargs:
            # Its names of them differ from model to model.
            bound = inspect.signature(self.kind.forward).bind(self, *args, **kwargs)
            args = bound.args[1:]
        return self._loradash_how.compute(self, *args)

    def product(self, parameter: str, x: Tensor, offsets: Tensor) -> Tensor:
        """x (M, K), rows sorted by expert, through every expert's W and adapter: (M, N)."""
        handle = self.__dict__[HANDLES].get(parameter)
        weight, bias = getattr(self, parameter), getattr(self, f"{parameter}_bias", None)
        if weight.requires_grad:
            weight, bias = as_declared(self, parameter, weight), as_declared(self, f"{parameter}_bias", bias)
        weight = weight.transpose(1, 2) if self._loradash_how.transposed else weight
        # As transformers' grouped product has it.
        x = x.to(weight.dtype)
        if handle is None or not handle.active:
            a, b = weight.new_empty(len(weight), 0, weight.shape[2]), weight.new_empty(*weight.shape[:2], 0)
            return dash_experts(x, weight, offsets, bias, lora_a=a, lora_b=b)
        config = handle.config
        parts = {part: getattr(self, f"{parameter}_{part}") for part in PARTS[:-1]}
        try:
            return dash_experts(
                x,
                weight,
                offsets,
                bias,
                **parts,
                scaling=config.scaling,
                dropout_p=config.dropout,
                training=self.training,
            )
        except ValueError as error:
            raise ValueError(f"{handle.label()}: {error}") from error

    def __reduce_ex__(self, protocol: Any) -> tuple:
        """The class is made, so that copies and pickles must make it again."""
        return _blank, (self.kind, self._loradash_how), self.__dict__

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """`to`, `half`, `cuda`: weights before `merge` go along."""
        super()._apply(fn, recurse)
        for handle in self.__dict__[HANDLES].values():
            if handle.unmerged is not None:
                handle.unmerged.data = fn(handle.unmerged.data)
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if hasattr(destination, "_metadata") and any(h.merged for h in self.__dict__[HANDLES].values()):
            destination._metadata[prefix[:-1]]["merged"] = True

    def _load_from_state_dict(self, state_dict: dict, prefix: str, local_metadata: dict, *args: Any) -> None:
        handles = self.__dict__[HANDLES]
        merged = [h.label() for h in handles.values() if h.merged and prefix + h.parameter in state_dict]
        if merged:
            raise ValueError(f"{merged[0]} is merged; unmerge(model) before load_state_dict")
        if local_metadata.get("merged") and any(f"{prefix}{name}_lora_b" in state_dict for name in handles):
            raise ValueError(
                f"{prefix}: the state dict is that of a merged model, whose adapters would count twice here; unmerge(model) "
                "before state_dict"
            )
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)


@functools.cache
def _adapted(kind: Any, how: Kind) -> Any:
    return type(f"Dash{kind.__name__}", (DashExperts, kind), {"kind": kind, HOW: how, "__module__": kind.__module__})


def _blank(kind: type[nn.Module], how: Kind) -> DashExperts:
    cls = _adapted(kind, how)  # type: ignore[arg-type]
    return cls.__new__(cls)


class ExpertParameter:
    """An adapted parameter of an experts module, as a layer (`loradash.state.AdaptedLayer`) with a leading dimension E.

    Its tensors are the module's, under the parameter's name: gate_up_proj_lora_a (E, r, K), gate_up_proj_lora_b (E, N, r),
    gate_up_proj_dash_sigma (E, s) are parameters; ..._dash_u (E, N, s), ..._dash_vt (E, s, K), ..._launched () buffers, all
    in float32. Experts without an update at launch get no directions: their u and v stay zero and they stay plain LoRA.

    Args:
        module: it has the parameter, and changes with `install` only.
        parameter: the parameter's name in the module.
        config: the settings of this layer.
        name: the parameter's name in the model, for error messages.
    """

    base = None

    def __init__(self, module: nn.Module, parameter: str, config: DashConfig, name: str = "") -> None:
        how = kind_of(module)
        assert how is not None
        self.module, self.parameter, self.config, self.name = module, parameter, config, name
        self.how, self.enabled = how, True
        self.unmerged: Tensor | None = None
        # Noted here: FSDP1 and ZeRO-3 leave the parameter without its shape between uses.
        self.experts, rows, columns = zero.whole_shape(self.weight)
        self.out_features, self.in_features = (columns, rows) if how.transposed else (rows, columns)

    def label(self) -> str:
        """What errors call it."""
        return self.name or f"{type(self.module).__name__}.{self.parameter}"

    def shapes(self, config: DashConfig) -> dict[str, tuple[int, ...]]:
        """Shapes of the adapter's tensors for these settings, by name."""
        return stacked_shapes(self.experts, self.out_features, self.in_features, config)

    def install(self) -> None:
        """Gives the module the adapter's tensors, B and Δσ zero, and the class that computes with them."""
        module, device = self.module, self.weight.device
        for part, shape in self.shapes(self.config).items():
            name = f"{self.parameter}_{part}"
            tensor = torch.zeros(shape, dtype=torch.bool if part == "launched" else torch.float32, device=device)
            if part == "lora_a":
                # As a linear layer's, expert by expert.
                bound = 1 / math.sqrt(self.in_features)
                nn.init.uniform_(tensor, -bound, bound)
            if part in PARAMETERS:
                module.register_parameter(name, nn.Parameter(tensor))
            else:
                module.register_buffer(name, tensor)
        if not isinstance(module, DashExperts):
            module.__class__ = _adapted(type(module), self.how)  # type: ignore[arg-type]
        module.__dict__.setdefault(HANDLES, {})[self.parameter] = self
        self.freeze_base()

    def freeze_base(self) -> None:
        """Freezes the weight, and the bias unless `config.train_bias` wants it trained."""
        self.weight.requires_grad_(False)
        if self.bias is not None:
            self.bias.requires_grad_(self.config.train_bias)

    def remove(self) -> None:
        """Undoes `install`."""
        for part in PARTS:
            delattr(self.module, f"{self.parameter}_{part}")
        handles = self.module.__dict__[HANDLES]
        del handles[self.parameter]
        if not handles and isinstance(self.module, DashExperts):
            del self.module.__dict__[HANDLES]
            self.module.__class__ = self.module.kind  # type: ignore[assignment]

    def _part(self, part: str) -> Tensor:
        return getattr(self.module, f"{self.parameter}_{part}")

    @property
    def lora_a(self) -> Tensor:
        return self._part("lora_a")

    @property
    def lora_b(self) -> Tensor:
        return self._part("lora_b")

    @property
    def dash_sigma(self) -> Tensor:
        return self._part("dash_sigma")

    @property
    def dash_u(self) -> Tensor:
        return self._part("dash_u")

    @property
    def dash_vt(self) -> Tensor:
        return self._part("dash_vt")

    @property
    def launched(self) -> Tensor:
        return self._part("launched")

    @property
    def weight(self) -> Tensor:
        return getattr(self.module, self.parameter)

    @property
    def bias(self) -> Tensor | None:
        return getattr(self.module, f"{self.parameter}_bias", None)

    @property
    def scaling(self) -> float:
        return self.config.scaling

    @property
    def merged(self) -> bool:
        return self.unmerged is not None

    @property
    def active(self) -> bool:
        """Does forward add the low-rank terms?"""
        return self.enabled and self.unmerged is None

    def oriented(self, weight: Tensor) -> Tensor:
        """A tensor of the stored weight's shape, or one expert's, as (..., N, K)."""
        return weight.mT if self.how.transposed else weight

    def weight_nk(self) -> Tensor:
        """W (E, N, K): a view."""
        return self.oriented(self.weight)

    def views(self) -> list[ExpertView]:
        """Its matrices, one an expert."""
        return [ExpertView(self, expert) for expert in range(self.experts)]

    def launch(self, directions: Directions) -> None:
        """Takes u (E, N, s) and vt (E, s, K), and starts Δσ at zero; ValueError, and no change, where that cannot be."""
        take_directions(self, directions)

    def launch_experts(self, found: Mapping[int, Directions]) -> None:
        """`launch` of some experts, each with its own u (N, s) and vt (s, K); the others stay plain LoRA."""
        u, vt = torch.zeros_like(self.dash_u), torch.zeros_like(self.dash_vt)
        for expert, directions in found.items():
            u[expert], vt[expert] = directions.u, directions.vt
        self.launch(next(iter(found.values()))._replace(u=u, vt=vt))

    @torch.no_grad()
    def delta(self, expert: int | None = None) -> Tensor:
        """ΔW (E, N, K), or of one expert (N, K), in float32. Sharded adapters are gathered: every process must call this."""
        a, b, u, vt, sigma = (gathered(self._part(p)) for p in ("lora_a", "lora_b", "dash_u", "dash_vt", "dash_sigma"))
        if expert is not None:
            a, b, u, vt, sigma = (t[expert] for t in (a, b, u, vt, sigma))
        with torch.autocast(a.device.type, enabled=False):
            return self.scaling * (b.float() @ a.float()) + (u.float() * sigma.float().unsqueeze(-2)) @ vt.float()

    @torch.no_grad()
    def merged_weight(self) -> Tensor:
        """W + ΔW in the stored weight's shape and dtype, rounded once. ValueError where it cannot be, as `DashLinear`'s."""
        if self.weight.is_meta:
            raise ValueError(f"{self.label()}: its weight is on meta and cannot be merged")
        weight = gathered(self.weight)
        merged = torch.empty_like(weight)
        # One expert at a time: all in float32 would be twice or more of a large parameter.
        for expert, (old, new) in enumerate(zip(weight, merged, strict=True)):
            new.copy_(old.to(torch.promote_types(old.dtype, torch.float32)) + self.oriented(self.delta(expert)))
        if not bool(merged.isfinite().all()) and bool(weight.isfinite().all()):
            raise ValueError(f"{self.label()}: the merged weight is not finite in {weight.dtype}")
        return merged

    @torch.no_grad()
    def merge(self, requantise: bool = False, part: Tensor | None = None) -> None:
        """Adds ΔW to the weight, as a new parameter; a sharded one in place, as is one whose `part` FSDP1 has (`TakesUpdate`).
        Again: no effect."""
        if self.merged:
            return
        merged, weight = self.merged_weight(), self.weight
        if is_sharded(weight):
            self.unmerged = zero.own_part(weight) if zero.is_partitioned(weight) else weight.detach().clone()
            assign(weight, merged, source=0)
        elif part is not None:
            self.unmerged = part
            weight.copy_(merged)
        else:
            setattr(self.module, self.parameter, nn.Parameter(merged, requires_grad=False))
            self.unmerged = weight

    @torch.no_grad()
    def unmerge(self) -> None:
        """Puts the original weight back, bit for bit. Without `merge`: no effect."""
        original = self.unmerged
        if original is None:
            return
        if zero.is_partitioned(self.weight):
            zero.put_back(self.weight, original)
        elif isinstance(original, nn.Parameter):
            setattr(self.module, self.parameter, original)
        elif self.weight.shape == original.shape:
            self.weight.copy_(original)
        else:
            raise ValueError(f"{self.label()}: FSDP1 holds its weight whole; unmerge outside of summon_full_params")
        self.unmerged = None


class ExpertView:
    """One matrix of an adapted expert parameter, as a layer (N, K) to decompose (`loradash.state.AdaptedLayer`)."""

    base = None

    def __init__(self, whole: ExpertParameter, expert: int) -> None:
        self.whole, self.expert = whole, expert

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ExpertView) and self.whole is other.whole and self.expert == other.expert

    def __hash__(self) -> int:
        return hash((id(self.whole), self.expert))

    def __getattr__(self, name: str) -> Any:
        """The parts of an adapter and the weight are slices of the whole's; all else is the same for every expert."""
        value = getattr(self.whole, name)
        return value[self.expert] if name in (*PARTS[:-1], "weight") else value

    @property
    def name(self) -> str:
        return f"{self.whole.name}[{self.expert}]"

    def weight_nk(self) -> Tensor:
        return self.whole.oriented(self.weight)


def matrices(layers: Mapping[str, Any]) -> dict[str, Any]:
    """The same layers by name, an expert parameter as the matrices of its experts: "experts.gate_up_proj[3]"."""
    found: dict[str, Any] = {}
    for name, layer in layers.items():
        if isinstance(layer, ExpertParameter):
            found |= {f"{name}[{view.expert}]": view for view in layer.views()}
        else:
            found[name] = layer
    return found


def stacked_shapes(experts: int, n: int, k: int, config: DashConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of what an expert parameter (E, N, K) gets, by name; all are float32 but `launched`, which is bool."""
    return {
        part: shape if part == "launched" else (experts, *shape) for part, shape in adapter_shapes(n, k, config).items()
    }


def expert_parameters(module: nn.Module) -> Iterator[ExpertParameter]:
    """The adapted parameters of a module, none for one without."""
    if isinstance(module, DashExperts):
        yield from module.__dict__[HANDLES].values()
