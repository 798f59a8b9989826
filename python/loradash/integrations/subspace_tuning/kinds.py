"""The three layers that the authors wrote, and how each becomes an `AuthorsLayer` and is given back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, cast

from torch import Tensor, nn

from loradash_kernels import low_rank_update

from ...base_layers import computes_plainly, features
from ...config import DashConfig
from ...state import VIEW
from .dialects import FLAG, KEYS
from .layers import AuthorsLayer, Semantics, patched_class

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
# What `AuthorsLayer.start` gives a layer besides its buffer.
_ADDED = (
    "enabled",
    "name",
    "run",
    "semantics",
    "reminded",
    "_fresh",
    "_unmerged",
    "_seen",
    "transposed",
    "_config",
    "_trained",
    "_width",
)


def has_hooks(module: nn.Module) -> bool:
    """Would a call of the module run hooks?"""
    return any(getattr(module, name, None) for name in _HOOKS)


class LoralibLayer(AuthorsLayer):
    """loralib's: all tensors are parameters of the layer itself."""

    dialect = "loralib"

    def stored(self, part: str) -> Tensor:
        name = KEYS["loralib"][part]
        own = self._parameters.get(name)
        # Replicas of DataParallel keep them as plain attributes.
        return getattr(self, name) if own is None else own


class DropInLayer(LoralibLayer):
    """Our own `Linear`, laid out as loralib's."""

    @property
    def merges_in_eval(self) -> bool:  # type: ignore[override]
        # The authors' file takes the argument and has no code for it; its count of calls would stop in eval.
        return self.semantics == "loradash"


class CrMrLayer(AuthorsLayer):
    """CR_MR's fork of PEFT: A, B and Δσ are the weights of small nn.Linear inside the layer."""

    dialect = "cr_mr"
    merges_in_eval = True

    def stored(self, part: str) -> Tensor:
        owner, _, own = KEYS["cr_mr"][part].partition(".")
        found = getattr(self, owner)
        return getattr(found, own) if own else found


class SdgLayer(AuthorsLayer):
    """SdG's fork of PEFT wraps the base layer and keeps adapters by name: a view of the one that a layer has.

    It is no part of the model's tree. The layer itself, `host`, has attributes whose names mean other things there.
    """

    dialect = "sdg"

    def __init__(self, host: nn.Module, semantics: Semantics, name: str) -> None:
        nn.Module.__init__(self)
        # An assignment would make the layer a part of its own view.
        self.__dict__["host"] = host
        self.adapter = next(iter(cast(nn.ModuleDict, host.lora_A)))
        self.start(semantics, name)

    def stored(self, part: str) -> Tensor:
        holder = getattr(self.host, KEYS["sdg"][part].split(".")[0])[self.adapter]
        return holder.weight if isinstance(holder, nn.Linear) else holder

    def settings(self) -> DashConfig:
        return self.settings_of(self.host.scaling[self.adapter])

    def take_settings(self, config: DashConfig) -> None:
        self.host.scaling[self.adapter] = config.scaling
        self.host.warmup = config.prelaunch_steps
        if config.dropout != self.drop_probability():
            self.host.lora_dropout[self.adapter] = nn.Dropout(config.dropout)

    def drop_probability(self) -> float:
        return float(getattr(self.host.lora_dropout[self.adapter], "p", 0.0))

    def register_buffer(self, name: str, tensor: Tensor | None, persistent: bool = True) -> None:
        # There it goes where the model goes.
        self.host.register_buffer(name, tensor, persistent)

    @property
    def launched(self) -> Tensor:  # type: ignore[override]
        return self.host.launched

    @property
    def base(self) -> nn.Module:  # type: ignore[override]
        return self.host.base_layer

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        return self.base.weight  # type: ignore[return-value]

    @property
    def bias(self) -> Tensor | None:  # type: ignore[override]
        return self.base.bias  # type: ignore[return-value]

    @property
    def in_features(self) -> int:  # type: ignore[override]
        return features(self.base)[0]

    @property
    def out_features(self) -> int:  # type: ignore[override]
        return features(self.base)[1]

    @property
    def index(self) -> int:  # type: ignore[override]
        return self.host.index

    @property
    def warmup(self) -> int:  # type: ignore[override]
        return self.host.warmup

    @property
    def FLAG(self) -> int:
        return self.host.FLAG

    @FLAG.setter
    def FLAG(self, calls: int) -> None:
        self.host.FLAG = calls

    def _base_output(self, x: Tensor) -> Tensor:
        return self._called(self.base, x, (), {})

    def _product(self, x: Tensor, dash: bool) -> Tensor:
        base = self.base
        if computes_plainly(base) and not has_hooks(base):
            return super()._product(x, dash)
        return low_rank_update(self._base_output(x), x, **self._terms(dash))


class SdgHost(nn.Module):
    """A layer of SdG's fork whose one adapter is computed by its `SdgLayer`, its view."""

    origin: ClassVar[tuple[type[nn.Module], type[nn.Module]]]

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        host, view = cast(Any, self), self.__dict__[VIEW]
        if host.disable_adapters or host.merged:
            return super().forward(x, *args, **kwargs)
        if args or kwargs or list(host.active_adapters) != [view.adapter]:
            raise ValueError(
                f"{view.name}: a patched layer computes its one adapter {view.adapter!r}, got active adapters "
                f"{list(host.active_adapters)} and arguments {sorted(kwargs)}; unpatch(model) first"
            )
        view.training = self.training
        return view(x)

    def get_delta_weight(self, adapter: str) -> Tensor:
        """For their `merge`: the whole update in the stored weight's shape; theirs leaves the directions untransposed."""
        view = self.__dict__[VIEW]
        delta = view.delta()
        return (delta.t() if cast(Any, self).fan_in_fan_out else delta).to(view.lora_b.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        super()._apply(fn, recurse)
        # The view has no tensors of its own but the weight before a merge.
        self.__dict__[VIEW]._apply(fn)
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        view = self.__dict__[VIEW]
        destination[f"{prefix}{FLAG}.{view.adapter}"] = view.flag()
        view.note_merged(destination, prefix)

    def _load_from_state_dict(self, state_dict: dict, prefix: str, local_metadata: dict, *args: Any) -> None:
        view = self.__dict__[VIEW]
        view.refuse_merged(prefix, state_dict, local_metadata)
        found = {key: value for key, value in state_dict.items() if key.startswith(prefix)}
        flag = found.pop(f"{prefix}{FLAG}.{view.adapter}", None)
        super()._load_from_state_dict(found, prefix, local_metadata, *args)
        # Its own parameters come after those of the layer.
        u = found.get(f"{prefix}{KEYS['sdg']['dash_u'].format(adapter=view.adapter)}")
        if u is not None:
            view.note_loaded(flag, u)


def adopt(module: nn.Module, kind: type[AuthorsLayer], semantics: Semantics, name: str = "") -> AuthorsLayer:
    """Makes a layer of theirs compute by our operator; returns the adapted layer, for SdG a view. All of it or nothing."""
    if issubclass(kind, SdgLayer):
        module.__dict__[VIEW] = view = kind(module, semantics, name)
        module.__class__ = patched_class(SdgHost, type(module))
        return view
    theirs, module.__class__ = type(module), patched_class(kind, type(module))
    layer = cast(AuthorsLayer, module)
    try:
        layer.start(semantics, name)
    except BaseException:
        _forget(module, theirs)
        raise
    return layer


def release(module: nn.Module) -> None:
    """Gives a layer its own class back; parameters, phase and FLAG are as they are now."""
    layer = module.__dict__.get(VIEW, module)
    layer.end()
    if VIEW in module.__dict__:
        # A schedule may have the view still, and is to find no layer in it, as in those that change their class.
        layer.__dict__["host"] = None
    _forget(module, type(module).origin[1])  # type: ignore[attr-defined]


def _forget(module: nn.Module, theirs: type[nn.Module]) -> None:
    module.__class__ = theirs
    module._buffers.pop("launched", None)
    module._non_persistent_buffers_set.discard("launched")
    for key in (VIEW, *_ADDED):
        module.__dict__.pop(key, None)
