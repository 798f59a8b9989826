"""Fused projections with an adapter for each of their parts: q, k and v in one weight, the two halves of a gated block."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from loradash_kernels import GroupMember, dash_linear_group

from .base_layers import features, is_linear, is_transposed, treatment
from .config import matches
from .distributed import is_dtensor
from .linear import DashLinear
from .model import wrapper_of
from .quantised import is_quantised
from .slices import LinearSlice
from .state import STATE, plain_name
from .units import as_declared

Parts = Mapping[str, int] | Sequence[str]
"""Outputs of every part by name, in order; or names alone, of parts of one size."""

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class SplitLinear(nn.Module):
    """A fused linear layer whose parts are layers of their own: children by the parts' names, which `apply_dash` finds.

    y = [y_1 | y_2 | ...]; all parts are computed by one `dash_linear_group`, whose members' weights are views of the one
    weight. A part without an adapter is a member of rank 0. Where something else hangs on a part (hooks, another framework's
    adapter, a mixed batch, a mode or dropout of its own) they are called one by one.

    Parameters: weight (N, K), or (K, N) as Conv1D has it, and bias (N), under the names that they had.

    Args:
        linear: nn.Linear or transformers' Conv1D; it is not changed.
        sizes: outputs of every part by name, in order; their sum is N.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None
    origin: nn.Module
    # The weight before parts of it were merged, and the rows at which these begin.
    before: nn.Parameter | None
    taken: set[int]
    # To export it is an adapted layer.
    base = None
    unit_kernel: tuple[int, ...] = ()

    def __init__(self, linear: nn.Module, sizes: Mapping[str, int], name: str = "") -> None:
        super().__init__()
        self.name, self.sizes = name, dict(sizes)
        self.transposed = is_transposed(linear)
        self.in_features, self.out_features = features(linear)
        self.__dict__.update(origin=linear, before=None, taken=set())
        self.__dict__.update({key: value for key, value in vars(linear).items() if key not in self.__dict__})
        self.register_parameter("weight", linear.weight)  # type: ignore[arg-type]
        self.register_parameter("bias", linear.bias)  # type: ignore[arg-type]
        start = 0
        for part, size in self.sizes.items():
            self.add_module(part, LinearSlice(self, start, size))
            start += size
        self.train(linear.training)

    def parts(self) -> list[nn.Module]:
        """The children, in the order of their rows."""
        return [self._modules[part] for part in self.sizes]  # type: ignore[misc]

    def adapted(self) -> list[DashLinear]:
        """The parts that have the active adapter."""
        return [part for part in self.parts() if isinstance(part, DashLinear) and part.adapter is not None]

    def forward(self, input: Tensor) -> Tensor:
        """input (..., K) to (..., N)."""
        parts = self.parts()
        weight: Tensor = self.weight
        bias: Tensor | None = self.bias
        if is_dtensor(weight):
            raise ValueError(
                f"{self.name}: its weight is sharded (DTensor) while it runs; shard the block that holds it"
            )
        if type(weight) not in (nn.Parameter, Tensor) and is_quantised(weight):
            raise ValueError(
                f"{self.name}: its weight was quantised, and a part of it cannot be told; join_projections first"
            )
        if weight.requires_grad:
            weight, bias = as_declared(self, "weight", weight), as_declared(self, "bias", bias)
        if not all(map(_is_member, parts)):
            return torch.cat([part(input) for part in parts], -1)
        layers = [part if isinstance(part, DashLinear) and part.takes_plain_calls else None for part in parts]
        modes = {(layer.config.dropout, layer.training) for layer in layers if layer is not None}
        if not modes:
            return F.linear(input, weight.t() if self.transposed else weight, bias)
        if len(modes) > 1:
            return torch.cat([part(input) for part in parts], -1)
        ((dropout, training),) = modes
        sizes = list(self.sizes.values())
        weights = (weight.t() if self.transposed else weight).split(sizes)
        biases = [None] * len(sizes) if bias is None else bias.split(sizes)
        members = [_member(*each) for each in zip(layers, weights, biases, strict=True)]
        try:
            outputs = dash_linear_group(input, members, dropout_p=dropout, training=training)
        except ValueError as error:
            raise ValueError(f"{self.name or type(self).__name__} ({', '.join(self.sizes)}): {error}") from error
        return torch.cat(outputs, -1)

    @property
    def rank(self) -> int:
        """That of the one LoRA which all parts' updates are together: the sum of their r + s."""
        return sum(layer.config.r + layer.dash_vt.shape[0] for layer in self.adapted())

    @torch.no_grad()
    def folded(self) -> tuple[Tensor, Tensor]:
        """A (R, K) and B (N, R) of all parts' updates, R = `rank`: every part's B in its rows, and in columns of its own."""
        factors = [layer.folded(layer.adapter) for layer in self.adapted()]  # type: ignore[arg-type]
        whole = torch.zeros(self.out_features, self.rank, device=factors[0][1].device)
        column = 0
        for layer, (_, b) in zip(self.adapted(), factors, strict=True):
            whole[layer.start : layer.start + layer.out_features, column : column + b.shape[1]] = b
            column += b.shape[1]
        return torch.cat([a for a, _ in factors]), whole

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """`to`, `half`, `cuda`: the weight before `merge` goes along."""
        super()._apply(fn, recurse)
        if self.before is not None:
            self.before.data = fn(self.before.data)
        return self

    def _load_from_state_dict(self, state_dict: dict, prefix: str, local_metadata: dict, *args: Any) -> None:
        if self.taken and f"{prefix}weight" in state_dict:
            raise ValueError(f"{self.name} is merged; unmerge(model) before load_state_dict")
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)

    def extra_repr(self) -> str:
        parts = ", ".join(f"{part}={size}" for part, size in self.sizes.items())
        return f"in_features={self.in_features}, parts to be named: {parts}"


def _is_member(part: nn.Module) -> bool:
    """Is a part a slice of the weight, or an adapted layer around one, that no more than computes?"""
    base = part.base if isinstance(part, DashLinear) else part
    if type(base) is not LinearSlice or (isinstance(part, DashLinear) and part._mixed_rows is not None):
        return False
    return not any("forward" in m.__dict__ or any(getattr(m, hooks) for hooks in _HOOKS) for m in {part, base})


def _member(layer: DashLinear | None, weight: Tensor, bias: Tensor | None) -> GroupMember:
    if layer is None:
        (n, k), options = weight.shape, {"dtype": torch.float32, "device": weight.device}
        a, b = torch.empty(0, k, **options), torch.empty(n, 0, **options)  # type: ignore[call-overload]
        return GroupMember(weight=weight, bias=bias, lora_a=a, lora_b=b)
    return GroupMember(
        weight=weight,
        bias=bias,
        lora_a=layer.lora_a,
        lora_b=layer.lora_b,
        dash_u=layer.dash_u,
        dash_vt=layer.dash_vt,
        dash_sigma=layer.dash_sigma,
        scaling=layer.scaling,
    )


def split_projections(model: nn.Module, layers: Mapping[str, Parts]) -> list[str]:
    """Makes parts of fused layers linear layers of their own, in place, before `apply_dash`: each gets an adapter of its own.

    The state dict stays as it is. Parts are named in settings and files as layers are, "self_attn.qkv_proj.q":
    `exclude_modules` leaves one without an adapter, `overrides` gives one another rank. A file is loaded into a model that
    was split in the same way. `export_lora` makes one LoRA of the parts of a layer again, of the sum of their ranks;
    `merge_and_unload` and `join_projections` give the fused layer back.

    Args:
        layers: names of fused layers, or ends of names, with the parts of each: outputs by name, {"qkv_proj": {"q": 64,
            "k": 32, "v": 32}}, or names of parts of one size, {"gate_up_proj": ("gate", "up")}.

    Returns the names of the layers that were split.

    Raises ValueError, with the model unchanged, naming the layer: none of a name; one that is no linear layer, or computes in
    a way of its own (quantised, hooked, a subclass), or whose weight is another module's too; parts that do not sum to its
    outputs; an adapted or wrapped model.
    """
    modules = {plain_name(name): module for name, module in model.named_modules()}
    for name, module in modules.items():
        if isinstance(module, DashLinear) or STATE in module.__dict__:
            raise ValueError(f"{name or 'the model'} is adapted already; split_projections comes before apply_dash")
        if wrapper := wrapper_of(module):
            raise ValueError(f"{name or 'the model'} is wrapped in {wrapper}; split_projections comes before it")
    chosen: dict[str, SplitLinear] = {}
    for pattern, parts in layers.items():
        found = [name for name in modules if name and matches(name, [pattern])]
        if not found:
            raise ValueError(f"layers: {pattern!r} matches no module")
        for name in found:
            if name in chosen:
                raise ValueError(f"layers: {pattern!r} matches {name}, which another name matches too")
            chosen[name] = _split(name, modules[name], parts)
    for name, split in chosen.items():
        users = [
            n
            for n, m in modules.items()
            if m is not split.origin and any(p is split.weight for p in m._parameters.values())
        ]
        if users:
            raise ValueError(f"{name}: its weight is tied to that of {users[0]}, which would be split with it")
    for split in chosen.values():
        # They are the split layer's now, wherever that moves them.
        split.origin._parameters.update(weight=None, bias=None)
    _replace(model, {split.origin: split for split in chosen.values()})
    return list(chosen)


def join_projections(model: nn.Module) -> None:
    """Undoes `split_projections`: the fused layers themselves come back. Nothing happens where none is split.

    Raises ValueError, with the model unchanged, for a part that has an adapter (`merge_and_unload`) or hooks.
    """
    for name, split in model.named_modules():
        for part, module in split._modules.items() if isinstance(split, SplitLinear) else ():
            if type(module) is not LinearSlice:
                raise ValueError(
                    f"{plain_name(name)}.{part} is a {type(module).__name__}; merge_and_unload(model) first"
                )
            if not _is_member(module):
                raise ValueError(f"{plain_name(name)}.{part} has hooks, which the fused layer has no place for")
    join_plain(model)


def join_plain(model: nn.Module) -> None:
    """`join_projections` for the layers whose parts have nothing around or on them; others stay split."""
    splits = [m for m in model.modules() if isinstance(m, SplitLinear) and m is not model]
    splits = [s for s in splits if all(type(part) is LinearSlice and _is_member(part) for part in s.parts())]
    for split in splits:
        split.origin._parameters.update(weight=split.weight, bias=split.bias)
        split.origin.train(split.training)
        move_hooks(split, split.origin)
    _replace(model, {split: split.origin for split in splits})


def move_hooks(layer: nn.Module, base: nn.Module) -> None:
    """Gives a layer's hooks to the one that takes its place."""
    for key, hooks in vars(layer).items():
        if "_hooks" in key:
            base.__dict__[key].update(hooks)
    if layer._is_full_backward_hook is not None:
        base._is_full_backward_hook = layer._is_full_backward_hook


def _replace(model: nn.Module, by: Mapping[nn.Module, nn.Module]) -> None:
    for parent in list(model.modules()):
        for child, module in parent._modules.items():
            if module is not None and module in by:
                parent._modules[child] = by[module]


def _split(name: str, linear: nn.Module, parts: Parts) -> SplitLinear:
    if isinstance(linear, LinearSlice | SplitLinear) or not is_linear(linear):
        raise ValueError(f"{name} is a {type(linear).__name__}; only nn.Linear and Conv1D can be split")
    try:
        how = treatment(linear)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    if how != "adopted":
        raise ValueError(
            f"{name}: {type(linear).__name__} computes in a way of its own (quantised, hooked) and cannot be split"
        )
    try:
        return SplitLinear(linear, _sizes(name, features(linear)[1], parts), name)
    except KeyError as error:
        raise ValueError(f"{name}: a part cannot be called so: {error}") from error


def _sizes(name: str, n: int, parts: Parts) -> dict[str, int]:
    names = list(parts)
    strings = not isinstance(parts, str) and all(isinstance(part, str) for part in names)
    if not strings or len(names) < 2 or len(set(names)) < len(names):
        raise ValueError(f"{name}: parts are {parts!r}; wanted two names or more, each once")
    if not isinstance(parts, Mapping):
        if n % len(names):
            raise ValueError(f"{name} has {n} outputs, which are not {len(names)} parts of one size")
        return dict.fromkeys(names, n // len(names))
    wrong = [size for size in parts.values() if type(size) is not int or size < 1]
    if wrong:
        raise ValueError(f"{name}: sizes of parts must be integers of at least 1, got {wrong[0]!r}")
    if sum(parts.values()) != n:
        raise ValueError(
            f"{name} has {n} outputs, and its parts have {' + '.join(map(str, parts.values()))} = {sum(parts.values())}"
        )
    return dict(parts)
