"""`DashLoraModel`: PEFT's LoRA model with LORADASH layers."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import math
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer, LoraModel
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, _maybe_include_all_linear_layers
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn

from loradash.attention import call_adapted_layers
from loradash.bypass import bypassed_children, child_at, refuse_fusing
from loradash.distributed import gathered, is_sharded
from loradash.expert_modules import stacked_names
from loradash.formats import keep_differentiable, unready
from loradash.linear import DashLinear
from loradash.peft_layout import EXPERT_NAMES

from .config import DashLoraConfig
from .layer import FROZEN, DashLoraLayer, dash_class
from .merging import checked_merge
from .versions import warn_of_shards
from .views import STATES, dash_layers_of, layers_with

_NO_LINEAR = (
    nn.Embedding,
    nn.EmbeddingBag,
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.MultiheadAttention,
)


class DashLoraModel(LoraModel):
    """LoRA-Dash as a method of PEFT's: what `get_peft_model` makes of a `DashLoraConfig`.

    Everything that PEFT does with a LoRA model it does with this one. An adapter starts as plain LoRA; its directions are
    launched by `loradash.DashSchedule(model)`, or `loradash.prelaunch(model)`, while it is the active one.
    """

    tuner_layer_cls = DashLoraLayer

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """PEFT's, after everything that could be refused later was looked at: a refusal leaves the model as it was.

        Raises ValueError for a model adapted by somebody else, and for targets that are no linear layers, that are sharded, or
        that their parent passes by.
        """
        config: Any = self.peft_config[adapter_name]
        state_dict = kwargs.get("state_dict")
        check_model(model)
        if getattr(config, "_custom_modules", None):
            raise ValueError(
                "modules registered for LoRA (_register_custom_module) have no dash term; adapt the model without"
            )
        self._check_targets(model, config, state_dict)
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        for parent in list(model.modules()):
            if any(isinstance(child, DashLoraLayer) for child in parent.modules()):
                call_adapted_layers(parent)
                refuse_fusing(parent)

    def _check_targets(self, model: nn.Module, config: DashLoraConfig, state_dict: dict[str, Any] | None) -> None:
        _refuse_experts(model, config.target_modules)
        targets = self._targets(model, config, state_dict)
        places = {
            child_at(parent, child): place
            for parent in model.modules()
            for child, place in bypassed_children(parent).items()
        }
        twice = _under_several_names(model)
        for name, module in targets.items():
            base = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
            reason = _refusal(base)
            if module in places:
                reason = f"{places[module]} multiplies by its weight without calling it, so that an adapter would be passed by"
            if module in twice:
                reason = f"it is one module under several names ({', '.join(twice[module])}), of which PEFT adapts one"
            if reason is not None:
                raise ValueError(
                    f"{name} ({type(base).__name__}) cannot be adapted: {reason}; exclude_modules leaves it out"
                )

    def _targets(self, model: nn.Module, config: Any, state_dict: dict[str, Any] | None) -> dict[str, nn.Module]:
        """The modules that PEFT is about to take, by name."""
        # PEFT writes what it finds out into the settings.
        config = copy.copy(config)
        config = self._prepare_adapter_config(config, self.get_model_config(model))
        config = _maybe_include_all_linear_layers(config, model)
        named = None if state_dict is None else {key.rsplit(f".{self.prefix}", 1)[0] for key in state_dict}
        inside = tuple(f"{name}." for name, _ in dash_layers_of(model))
        return {
            name: module
            for name, module in model.named_modules()
            if name
            and not name.startswith(inside)
            and (self._check_target_module_exists(config, name) if named is None else name in named)
        }

    def _add_targets_to_tie(self, peft_config: Any, tied_weight_keys: list[str]) -> None:
        """PEFT's question, asked before anything is changed, how a target that is tied to the embedding gets its adapter."""
        raise ValueError(
            f"ensure_weight_tying: an adapter of {', '.join(sorted(tied_weight_keys))} would have to be the embedding's too, and "
            "LoRA-Dash is a method for linear layers; leave it out of target_modules"
        )

    @staticmethod
    def _create_new_module(
        lora_config: DashLoraConfig, adapter_name: str, target: nn.Module, **kwargs: Any
    ) -> nn.Module:
        """PEFT's layer for a target, whatever its format, made one of ours by its class."""
        layer: Any = LoraModel._create_new_module(lora_config, adapter_name, target, **kwargs)
        kind: Any = type(layer)
        layer.__class__ = dash_class(kind)
        layer.add_dash_term(adapter_name, lora_config)
        keep_differentiable(layer.get_base_layer())
        return layer

    @contextlib.contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """PEFT's, which leaves the hooks of a mixed batch on all layers after an exception; every later call would be one."""
        if kwargs.get("adapter_names") is None:
            with super()._enable_peft_forward_hooks(*args, **kwargs):
                yield
            return
        before = {module: set(module._forward_pre_hooks) for module in _hookable(self)}
        try:
            with super()._enable_peft_forward_hooks(*args, **kwargs):
                yield
        finally:
            for module, known in before.items():
                for key in set(module._forward_pre_hooks) - known:
                    del module._forward_pre_hooks[key]
                    module._forward_pre_hooks_with_kwargs.pop(key, None)

    @classmethod
    def _get_adapter_state_dict(
        cls, model: Any, config: Any, adapter_name: str, *args: Any, **kwargs: Any
    ) -> dict[str, Any]:
        """PEFT's, from 0.21 on; tensors that were not gathered for saving are told as PEFT tells those of its own LoRA."""
        found = super()._get_adapter_state_dict(model, config, adapter_name, *args, **kwargs)
        warn_of_shards(found, adapter_name)
        return found

    def set_adapter(self, adapter_name: str | list[str], *args: Any, **kwargs: Any) -> None:
        """PEFT's. An adapter made of another one's settings, A and B, as TRL makes its reference model, gets that one's Δσ and
        directions first: PEFT's LoRA has none, so nobody copies them."""
        for name in [adapter_name] if isinstance(adapter_name, str) else adapter_name:
            _complete_copy(self, name)
        super().set_adapter(adapter_name, *args, **kwargs)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """PEFT's, which makes new parameters that train, whether the old ones did or not."""
        layers = [layer for _, layer in layers_with(self.model, adapter_name)]
        trains = [layer.lora_dash_sigma[adapter_name].requires_grad for layer in layers]
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        for layer, train in zip(layers, trains, strict=True):
            layer.lora_dash_sigma[adapter_name].requires_grad_(train)

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """PyTorch's, which every way of saving asks. Warns of adapters that are plain LoRA because nobody counts their steps."""
        layers = dict(dash_layers_of(self.model))
        for adapter in self.peft_config:
            state = self.model.__dict__.get(STATES, {}).get(adapter)
            own = [layer for layer in layers.values() if adapter in layer.lora_dash_sigma]
            if (state is None or not state.schedules) and any(layer.is_plain_lora_by_mistake(adapter) for layer in own):
                warnings.warn(
                    f"loradash: adapter {adapter} was trained without DashSchedule or DashCallback: it is plain LoRA so far",
                    stacklevel=2,
                )
        return super().state_dict(*args, **kwargs)

    def merge_adapter(self, *args: Any, **kwargs: Any) -> None:
        """PEFT's, for all layers or, where one cannot, none."""
        with checked_merge(dict(dash_layers_of(self.model))):
            super().merge_adapter(*args, **kwargs)

    def _unload_and_optionally_merge(self, merge: bool = True, *args: Any, **kwargs: Any) -> Any:
        with checked_merge(dict(dash_layers_of(self.model)) if merge else {}):
            return super()._unload_and_optionally_merge(merge, *args, **kwargs)

    def add_weighted_adapter(
        self, adapters: list[str], weights: list[float], adapter_name: str, *args: Any, **kwargs: Any
    ) -> None:
        """PEFT's. Adapters before launch combine as plain LoRA does. Where one of them is launched, each is taken as plain LoRA
        of rank r + s, so that the new adapter holds their dash terms, and its rank grows accordingly: with "cat" it is the sum
        of theirs, else the largest. The new adapter is itself before launch."""
        biased = [name for name in adapters if getattr(self.peft_config.get(name), "lora_bias", False)]
        if biased:
            raise ValueError(f"lora_bias: PEFT would leave the biases of {', '.join(biased)} out of the new adapter")
        with self._folded(adapters):
            super().add_weighted_adapter(adapters, weights, adapter_name, *args, **kwargs)
        for _, layer in layers_with(self.model, adapter_name):
            layer.note_untrained(adapter_name)

    def _svd_generalized_task_arithmetic_weighted_adapter(self, *args: Any, **kwargs: Any) -> Any:
        """PEFT's A and B; of a layer with a side below the new adapter's rank it can decompose no more than that side."""
        combination, adapters, weights, rank, target, *rest = args
        least = min(rank, target.in_features, target.out_features)
        a, b = super()._svd_generalized_task_arithmetic_weighted_adapter(
            combination, adapters, weights, least, target, *rest, **kwargs
        )
        pad = nn.functional.pad
        return pad(a, (0, 0, 0, rank - least)), pad(b, (0, rank - least))

    @contextlib.contextmanager
    def _folded(self, adapters: list[str]) -> Iterator[None]:
        """Within the block these adapters are plain LoRA, of one rank each where one of them is launched."""
        present = [name for name in dict.fromkeys(adapters) if name in self.peft_config]
        layers = {name: [layer for _, layer in layers_with(self.model, name)] for name in present}
        launched = any(layer.lora_dash_launched[name] for name in present for layer in layers[name])
        configs: dict[str, Any] = {name: self.peft_config[name] for name in present}
        undo: list[Any] = []
        try:
            for name in present:
                # PEFT gives the new adapter the rank as its alpha, which is a scaling of 1 without rsLoRA.
                self.peft_config[name] = dataclasses.replace(configs[name], use_rslora=False)
                if not launched:
                    continue
                factors = [_factors(layer, name) for layer in layers[name]]
                rank = max((a.shape[0] for a, _ in factors), default=configs[name].r)
                for layer, (a, b) in zip(layers[name], factors, strict=True):
                    undo.append((layer, name, _parts(layer, name)))
                    more = rank - a.shape[0]
                    a, b = nn.functional.pad(a, (0, 0, 0, more)), nn.functional.pad(b, (0, more))
                    _replace_parts(layer, name, a, b)
                self.peft_config[name] = dataclasses.replace(configs[name], use_rslora=False, r=rank, rank_pattern={})
            yield
        finally:
            self.peft_config.update(configs)
            for layer, name, parts in undo:
                _restore_parts(layer, name, parts)


def check_model(model: nn.Module) -> None:
    """Raises ValueError for a model that somebody else adapted."""
    inside: set[nn.Module] = set()
    for name, module in model.named_modules():
        if isinstance(module, PeftModel | BaseTuner):
            raise ValueError(
                "the model is one of PEFT's already; model.add_adapter(name, config) gives it another adapter"
            )
        if isinstance(module, DashLinear):
            raise ValueError(f"{name or 'the model'} has an adapter of apply_dash; adapt the model by one of the two")
        if isinstance(module, AuxiliaryTrainingWrapper):
            inside.update(module.modules())
        elif isinstance(module, BaseTunerLayer) and not isinstance(module, DashLoraLayer) and module not in inside:
            raise ValueError(
                f"{name} has an adapter of another method of PEFT's ({type(module).__name__}); merge_and_unload it first"
            )


def _refuse_experts(model: nn.Module, targets: Any) -> None:
    """Raises ValueError for names that PEFT's LoRA takes for experts, and warns where "all-linear" would have meant them."""
    stacked = next(stacked_names(model), None)
    if stacked is None:
        return
    instead = (
        f"the experts of this model are parameters ({stacked}), and LORADASH in PEFT adapts linear layers; experts are adapted "
        "by loradash.apply_dash(model, DashConfig(target_parameters=[...]))"
    )
    if targets == "all-linear":
        warnings.warn(f"loradash: all-linear leaves the experts out: {instead}", stacklevel=2)
    if isinstance(targets, str) or targets is None:
        return
    ends = tuple(f".{name}" for name, _ in model.named_modules())
    lost = [
        t for t in targets if t.rpartition(".")[2] in EXPERT_NAMES and not any(end.endswith(f".{t}") for end in ends)
    ]
    if lost:
        raise ValueError(f"target_modules: {', '.join(sorted(lost))} match no layer: {instead}")


def _refusal(base: nn.Module) -> str | None:
    """Why a base layer cannot be adapted, or None."""
    if isinstance(base, _NO_LINEAR):
        return "LoRA-Dash is a method for linear layers"
    if any(is_sharded(p) for p in base.parameters()) or getattr(base, "_hf_tp_plan", None) is not None:
        return "it is sharded; adapt the model first, then shard it (tensor parallel models are not supported)"
    if any(hasattr(p, "ds_id") for p in base.parameters()):
        return "DeepSpeed ZeRO-3 keeps its weight in parts, of which no directions can be found; train with ZeRO-2 or FSDP2"
    return unready(base)


def _under_several_names(model: nn.Module) -> dict[nn.Module, list[str]]:
    names: dict[nn.Module, dict[tuple[int, str], str]] = {}
    parents = dict(model.named_modules())
    for name, module in model.named_modules(remove_duplicate=False):
        parent, _, child = name.rpartition(".")
        if name and parent in parents:
            names.setdefault(module, {})[id(parents[parent]), child] = name
    return {module: list(places.values()) for module, places in names.items() if len(places) > 1}


@torch.no_grad()
def _complete_copy(tuner: DashLoraModel, name: str) -> None:
    settings = tuner.peft_config.get(name)
    # An adapter that was read from a file has settings of its own, and one that starts anew has another A.
    for other in [key for key, own in tuner.peft_config.items() if own is settings and key != name]:
        layers = [layer for _, layer in layers_with(tuner.model, name) if other in layer.lora_dash_sigma]
        if _is_launched(layers, other) and not _is_launched(layers, name) and _are_equal(layers, name, other):
            for layer in layers:
                layer.lora_dash_sigma[name].copy_(layer.lora_dash_sigma[other])
                for key in FROZEN:
                    getattr(layer, key)[name].copy_(getattr(layer, key)[other])
            return


def _is_launched(layers: list[DashLoraLayer], name: str) -> bool:
    flags = [layer.lora_dash_launched[name] for layer in layers]
    if not flags or any(flag.is_meta for flag in flags):
        return False
    # Looked at once: on a GPU that waits for all that was queued.
    return bool(torch.stack([flag.to(flags[0].device) for flag in flags]).any())


def _are_equal(layers: list[DashLoraLayer], name: str, other: str) -> bool:
    """Have two adapters the same A and B, but for the dtype?"""
    pairs = ((part[name].weight, part[other].weight) for layer in layers for part in (layer.lora_A, layer.lora_B))
    return all(torch.equal(gathered(copied), gathered(original).to(copied.dtype)) for copied, original in pairs)


def _hookable(model: nn.Module) -> Iterator[nn.Module]:
    return (m for m in model.modules() if isinstance(m, LoraLayer | AuxiliaryTrainingWrapper))


def _factors(layer: DashLoraLayer, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """A (R, K) and B (N, R) of an adapter's whole update, R = r + s, with PEFT's share of the scaling on either."""
    a, b = layer.folded(name)
    # The sums of A and of B that "linear" multiplies are of such shares.
    root, r = math.sqrt(abs(layer.scaling[name])), layer.r[name]
    if root:
        a[:r] *= root
        b[:, :r] /= root
    return a, b


def _parts(layer: DashLoraLayer, name: str) -> tuple[Any, ...]:
    return layer.lora_A[name], layer.lora_B[name], layer.scaling[name], layer.lora_dash_sigma[name]


def _restore_parts(layer: DashLoraLayer, name: str, parts: tuple[Any, ...]) -> None:
    layer.lora_A[name], layer.lora_B[name], layer.scaling[name], layer.lora_dash_sigma[name] = parts


def _replace_parts(layer: DashLoraLayer, name: str, a: torch.Tensor, b: torch.Tensor) -> None:
    """Makes an adapter of a layer plain LoRA with these A (R, K) and B (N, R) and a scaling of 1."""
    dtype = layer.lora_A[name].weight.dtype
    linears = []
    for weight in (a, b):
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        linear.weight = nn.Parameter(weight.to(dtype))
        linears.append(linear)
    _restore_parts(layer, name, (*linears, 1.0, nn.Parameter(torch.zeros_like(layer.lora_dash_sigma[name]))))
