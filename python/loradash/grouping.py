"""Adapted layers that read the same tensor, computed together: q, k and v of attention, the two halves of a gated block."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from loradash_kernels import GroupMember, dash_linear_group
from loradash_kernels.notices import warn_once

from .config import DashConfig
from .linear import DashLinear
from .state import linears_of, own_layers, plain_name, unwrap

# Whose forward is known to call these children with one tensor, in this order: a parent's class, its path, the children.
_FAMILIES = (
    "Llama|Mistral|Mixtral|Ministral|Qwen2|Qwen2Moe|Qwen3|Qwen3Moe|Gemma|Gemma2|Gemma3|Olmo|Olmo2|Granite|Starcoder2"
)
_ENCODERS = "Bert|Roberta|XLMRoberta|Camembert|Electra"
_KNOWN = (
    (rf"({_FAMILIES})Attention", r"", ("q_proj", "k_proj", "v_proj")),
    (rf"({_FAMILIES})MLP", r"", ("gate_proj", "up_proj")),
    (rf"({_ENCODERS})(Self|SdpaSelf)Attention", r"^(?!.*crossattention)", ("query", "key", "value")),
    (rf"({_ENCODERS})(Self|SdpaSelf|Cross)Attention", r"crossattention", ("key", "value")),
    (r"(M?T5|UMT5)Attention", r"SelfAttention$", ("q", "k", "v")),
    (r"(M?T5|UMT5)Attention", r"EncDecAttention$", ("k", "v")),
    (r"(M?T5|UMT5)DenseGatedActDense", r"", ("wi_0", "wi_1")),
)

_PLAIN = (nn.Parameter, Tensor, nn.parameter.Buffer)


@dataclass
class _Snapshot:
    """What a member's output was computed with: its tensors, their versions, its mode and its settings."""

    tensors: tuple[Tensor | None, ...]
    versions: tuple[int, ...]
    training: bool
    config: DashConfig

    def drops_as(self, layer: DashLinear) -> bool:
        """Can one mask serve both? Somebody may have changed either since they were grouped."""
        same_mode = layer.takes_plain_calls and self.training == layer.training
        return same_mode and self.config.dropout == layer.config.dropout

    def is_of(self, other: _Snapshot | None) -> bool:
        return (
            other is not None
            and self.training == other.training
            and self.config is other.config
            and self.versions == other.versions
            and all(a is b for a, b in zip(self.tensors, other.tensors, strict=True))
        )


@dataclass
class _Record:
    """The outputs for one x that members have not taken yet, by their place."""

    x: Tensor
    version: int
    mode: tuple
    results: dict[int, tuple[_Snapshot, Tensor]]

    def serves(self, x: Tensor, mode: tuple) -> bool:
        return self.x is x and self.version == x._version and self.mode == mode


class Group:
    """Layers that share x. The first that its parent calls computes those that follow it too, and they take their outputs
    where they are called with the same tensor, unchanged, in the state in which they were computed. Whatever else happens, a
    layer computes for itself.

    Outputs wait only while the parent's forward runs: nothing is kept from one call to the next.
    """

    def __init__(self, names: Sequence[str], members: Sequence[DashLinear]) -> None:
        self.names, self.members = tuple(names), tuple(members)
        self.record: _Record | None = None
        self.open = False
        # The places that were called since the first of this round.
        self.called: set[int] = set()

    def begin(self, parent: nn.Module, args: Any) -> None:
        """A pre-hook of the parent's forward."""
        if not torch.compiler.is_compiling():
            self.open, self.record, self.called = True, None, set()

    def end(self, parent: nn.Module, args: Any, output: Any) -> None:
        """A hook of the parent's forward, which runs where that raises, too: output is None then."""
        if torch.compiler.is_compiling():
            return
        record, self.record, self.open = self.record, None, False
        if record is not None and output is not None:
            self._warn_of_rest(record)

    def _warn_of_rest(self, record: _Record) -> None:
        """Outputs that nobody took were computed in vain."""
        if record.results:
            vain = ", ".join(self.names[place] for place in record.results)
            warn_once(
                f"group_projections: {vain} was computed with its group and not called with the same tensor; leave it out of "
                "the group"
            )

    def output(self, layer: DashLinear, x: Tensor) -> Tensor | None:
        """The layer's output for x, or None where it has to compute that itself."""
        if not self.open or torch.compiler.is_compiling() or not _is_watched(x):
            return None
        place = next((i for i, member in enumerate(self.members) if member is layer), None)
        # A replica of DataParallel is no member.
        if place is None:
            return None
        if place in self.called:
            self.called = set()
        self.called.add(place)
        record, mode = self.record, _mode(x)
        if record is not None and record.serves(x, mode):
            snapshot, y = record.results.pop(place, (None, None))
            return y if snapshot is not None and snapshot.is_of(self._snapshot(layer, layer)) else None
        later = [i for i in range(place, len(self.members)) if i == place or i not in self.called]
        found = {i: self._snapshot(self.members[i], layer) for i in later}
        joining = {i: s for i, s in found.items() if s is not None and s.drops_as(layer)}
        if place not in joining or len(joining) < 2:
            return None
        return self._compute(place, joining, x, mode)

    def _compute(self, place: int, joining: dict[int, _Snapshot], x: Tensor, mode: tuple) -> Tensor:
        layers = [self.members[i] for i in joining]
        members = [_member(layer, snapshot.tensors) for layer, snapshot in zip(layers, joining.values(), strict=True)]
        try:
            outputs = dash_linear_group(x, members, dropout_p=layers[0].config.dropout, training=layers[0].training)
        except ValueError as error:
            raise ValueError(f"the group of {', '.join(self.names[i] for i in joining)}: {error}") from error
        if self.record is not None:
            self._warn_of_rest(self.record)
        results = {i: (s, y) for (i, s), y in zip(joining.items(), outputs, strict=True)}
        _, y = results.pop(place)
        self.record = _Record(x, x._version, mode, results)
        return y

    def _snapshot(self, layer: DashLinear, runs: DashLinear) -> _Snapshot | None:
        """The layer as it is, None where it does not compute as a member does: disabled, merged, quantised or pruned since, without the
        active adapter, in a mixed batch."""
        if layer.base is not None or not layer.takes_plain_calls:
            return None
        tensors = layer._tensors()
        for t in tensors:
            if t is None:
                continue
            if type(t) not in _PLAIN:
                if hasattr(t, "device_mesh"):
                    raise self._sharded(layer, runs, f"a {type(t).__name__}")
                return None
            # A tensor that somebody computes for every call (pruning) is not there yet.
            if t.is_inference() or not t.is_leaf:
                return None
        weight = tensors[0]
        expected = layer.in_features * layer.out_features
        if weight.numel() != expected or (expected and not weight.is_meta and weight.untyped_storage().size() == 0):
            raise self._sharded(layer, runs, "not there")
        return _Snapshot(tensors, tuple(t._version for t in tensors if t is not None), layer.training, layer.config)

    def _sharded(self, layer: DashLinear, runs: DashLinear, what: str) -> ValueError:
        names = dict(zip(map(id, self.members), self.names, strict=True))
        return ValueError(
            f"{names[id(layer)]}: its parameters are {what} while {names[id(runs)]} computes their group; shard the block "
            "that holds the group and not its layers, or ungroup_projections(model)"
        )

    def __getstate__(self) -> dict[str, Any]:
        """Copies and files have no outputs that wait."""
        return {**self.__dict__, "record": None, "open": False, "called": set()}


def _is_watched(x: Any) -> bool:
    """Would a change of x be seen? Tensors of inference mode and of transforms have no version."""
    return type(x) in _PLAIN and not x.is_inference() and not torch._C._are_functorch_transforms_active()


def _mode(x: Tensor) -> tuple:
    device = x.device.type
    cast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    return torch.is_grad_enabled(), cast


def _member(layer: DashLinear, tensors: tuple[Any, ...]) -> GroupMember:
    weight, bias, a, b, u, vt, sigma = tensors
    return GroupMember(
        weight=weight.t() if layer.transposed else weight,
        bias=bias,
        lora_a=a,
        lora_b=b,
        dash_u=u,
        dash_vt=vt,
        dash_sigma=sigma,
        scaling=layer.config.scaling,
    )


def group_projections(model: nn.Module, groups: Iterable[Sequence[str]] | None = None) -> list[tuple[str, ...]]:
    """Has adapted layers that read the same tensor computed together (`loradash_kernels.dash_linear_group`), in place.

    Layers stay what they are: their parameters, files, launch, merge and export are untouched, and whatever a group cannot
    compute a layer computes itself (docs/grouped.md). Members of a group drop the same elements of x. Compiled code computes
    the layers one by one.

    Args:
        model: after `apply_dash`.
        groups: the layers of every group in the order in which they are called, by name, or by the end of a name for every
            place in the model: ("q_proj", "k_proj", "v_proj"). None: those of the known architectures (Llama, Mistral,
            Qwen, Gemma and their kin, BERT and its kin, T5), as far as they are adapted.

    Returns the names of the members of every group that was made.

    Raises ValueError, with the model unchanged, naming the layer: none is found; one that is grouped already or kept whole;
    members of another in_features, dtype or dropout. TypeError for a PEFT model.
    """
    layers = linears_of(own_layers(model, "group_projections on a model of apply_dash"))
    modules = {plain_name(name): m for name, m in unwrap(model).named_modules(remove_duplicate=False)}
    found = _known(modules, layers) if groups is None else [g for names in groups for g in _by_hand(names, layers)]
    if not found:
        raise ValueError("no group of adapted layers was found; name them: groups=[('q_proj', 'k_proj', 'v_proj')]")
    members = [layer for names in found for layer in (layers[name] for name in names)]
    if len({id(layer) for layer in members}) < len(members):
        raise ValueError(f"a layer stands twice in the groups {found}")
    for names in found:
        _check({name: layers[name] for name in names})
    for names in found:
        group, parent = Group(names, [layers[name] for name in names]), _parent(names, modules)
        parent.register_forward_pre_hook(group.begin)
        parent.register_forward_hook(group.end, always_call=True)
        for member in group.members:
            member.group = group
    return found


def ungroup_projections(model: nn.Module) -> None:
    """Undoes `group_projections`: every layer computes for itself again. Nothing happens where there is no group."""
    for module in model.modules():
        if isinstance(module, DashLinear):
            module.__dict__.pop("group", None)
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for key, hook in list(hooks.items()):
                if isinstance(getattr(hook, "__self__", None), Group):
                    del hooks[key]
                    module._forward_hooks_always_called.pop(key, None)


def _known(modules: dict[str, nn.Module], layers: dict[str, DashLinear]) -> list[tuple[str, ...]]:
    found = []
    for path, module in modules.items():
        for cls, place, children in _KNOWN:
            if re.fullmatch(cls, type(module).__name__) and re.search(place, path):
                names = tuple(f"{path}.{child}" if path else child for child in children)
                names = tuple(name for name in names if name in layers and layers[name].base is None)
                if len(names) > 1:
                    found.append(names)
                break
    return found


def _by_hand(names: Sequence[str], layers: dict[str, DashLinear]) -> list[tuple[str, ...]]:
    if isinstance(names, str) or len(names) < 2:
        raise ValueError(f"a group is {names!r}; wanted the names of two layers or more")
    first = names[0]
    heads = [name[: len(name) - len(first)] for name in layers if f".{name}".endswith(f".{first}")]
    if not heads:
        raise ValueError(f"{first} is no adapted layer, nor the end of one's name")
    found = [tuple(f"{head}{name}" for name in names) for head in heads]
    missing = [name for group in found for name in group if name not in layers]
    if missing:
        raise ValueError(f"no adapted layer has the name {missing[0]}, of the group {tuple(names)}")
    return found


def _check(members: dict[str, DashLinear]) -> None:
    for name, layer in members.items():
        if layer.group is not None:
            raise ValueError(f"{name} is in a group already; ungroup_projections(model) first")
        if layer.base is not None:
            raise ValueError(f"{name} is kept whole ({type(layer.base).__name__}) and multiplies by its weight itself")
    facts = {
        "in_features": lambda layer: layer.in_features,
        "dtype": lambda layer: layer.weight.dtype,
        "dropout": lambda layer: layer.config.dropout,
    }
    for what, fact in facts.items():
        values = {name: fact(layer) for name, layer in members.items()}
        if len(set(values.values())) > 1:
            shown = ", ".join(f"{name} {value}" for name, value in values.items())
            raise ValueError(f"members of a group must be of one {what}: {shown}")


def _parent(names: Sequence[str], modules: dict[str, nn.Module]) -> nn.Module:
    """The innermost module that holds all members and is called, not merely a list."""
    paths = [name.split(".")[:-1] for name in names]
    common: list[str] = []
    for parts in zip(*paths):  # noqa: B905
        if len(set(parts)) > 1:
            break
        common.append(parts[0])
    while common and type(modules[".".join(common)]).forward is nn.Module.forward:
        common.pop()
    return modules[".".join(common)]
