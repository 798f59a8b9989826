"""Layers of the authors' classes that compute by our operator: their parameters stay where, and what, they are."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from loradash_kernels import Directions, dash_linear, low_rank_update, task_specific_directions

from ...config import DashConfig
from ...distributed import shard_of
from ...linear import DashLinear
from ...state import DashState
from .dialects import FLAG, KEYS, Dialect
from .state_dicts import lost_directions

Semantics = Literal["loradash", "authors"]


class AuthorsLayer(DashLinear):
    """A `DashLinear` over the parameters of a layer of theirs; `adopt` makes one of it, `release` gives it back.

    Attributes:
        semantics: "loradash": DashSchedule counts optimizer steps and launches; one dropout mask; eps in the change rate.
            "authors": forward calls are counted and the layer launches itself; two masks; no eps.
        warmup, FLAG, index: theirs. FLAG counts forward calls, and is warmup + 1 from launch on.
        run: the state of the model that the layer is part of, or None.
    """

    origin: ClassVar[tuple[type[nn.Module], type[nn.Module]]]
    """The two classes that `patched_class` made one of."""
    dialect: ClassVar[Dialect]
    merges_in_eval: ClassVar[bool] = False
    """Does a layer whose `merge_weights` is set merge in eval and unmerge in train?"""

    base = None
    adopted = None
    semantics: Semantics
    warmup: int
    FLAG: int
    index: int
    merge_weights: bool
    lora_dropout: Any
    run: DashState | None

    def start(self, semantics: Semantics, name: str = "") -> None:
        """What a layer of theirs needs besides what it has. Its phase is that of FLAG, or of U where FLAG was not kept."""
        self.enabled, self.name, self.run = True, name, None
        self.semantics, self.reminded, self._fresh = semantics, False, False
        self._unmerged, self._seen = None, (0, -1, False)
        self.transposed = bool(getattr(self, "fan_in_fan_out", False))
        smaller = min(self.in_features, self.out_features)
        self._width = smaller if smaller < self.index else None
        self.config = self.settings()
        self._trained = {part: self.stored(part).requires_grad for part in ("dash_sigma", "dash_u", "dash_vt")}
        for part in self._trained:
            self.stored(part).requires_grad_(part == "dash_sigma")
        u = self.stored("dash_u")
        launched = self.warmup < self.FLAG or (not u.is_meta and bool(u.any()))
        # Not on meta: nobody would fill it in.
        device = "cpu" if u.is_meta else u.device
        self.register_buffer("launched", torch.tensor(launched, device=device), persistent=False)
        self.note_phase(launched, self.FLAG)

    def end(self) -> None:
        """Leaves everything as the layer's own class would have it by now; the other end of `start`."""
        self.unmerge()
        self.note_phase(self.is_launched(), self.calls())
        # Until launch their code does not always freeze the same of these; at launch it does.
        for part, trained in self._trained.items():
            self.stored(part).requires_grad_(part == "dash_sigma" if self.is_launched() else trained)

    def settings(self) -> DashConfig:
        """Those of this layer as it is."""
        return self.settings_of(self.__dict__["scaling"])

    def settings_of(self, scaling: float) -> DashConfig:
        """The scaling is that which the layer computes with, by whatever rule it came about."""
        rank = self.lora_a.shape[0]
        alpha = float(scaling) * rank
        return DashConfig(
            r=rank,
            alpha=round(alpha) if alpha == round(alpha) else alpha,
            directions=int(self.index),
            prelaunch_steps=int(self.warmup),
            dropout=self.drop_probability(),
            train_bias=self.bias is not None and self.bias.requires_grad,
        )

    @property
    def config(self) -> DashConfig:
        return self._config

    @config.setter
    def config(self, config: DashConfig) -> None:
        """Settings that came with an adapter's file are theirs too."""
        self._config = config
        self.take_settings(config)

    def take_settings(self, config: DashConfig) -> None:
        """Their own scaling, warm-up and dropout become those of the settings."""
        self.__dict__["scaling"] = config.scaling
        self.warmup = config.prelaunch_steps
        if config.dropout != self.drop_probability():
            self.lora_dropout = nn.Dropout(config.dropout)

    def stored(self, part: str) -> Tensor:
        """The tensor in which the authors' layer keeps a part, in its shape."""
        raise NotImplementedError

    def _of_s(self, part: str, dim: int) -> Tensor:
        """A part with as many directions as the weight has; theirs have 8 whatever its size."""
        tensor = self.stored(part)
        if part == "dash_sigma":
            tensor = tensor if tensor.dim() == 1 else tensor.view(-1)
        return tensor if self._width is None else tensor.narrow(dim, 0, self._width)

    def has_sigma_whole(self) -> bool:
        """Is Δσ a parameter of theirs as it is, and no view of one?"""
        return self._width is None and self.stored("dash_sigma").dim() == 1

    @property
    def lora_a(self) -> Tensor:  # type: ignore[override]
        return self.stored("lora_a")

    @property
    def lora_b(self) -> Tensor:  # type: ignore[override]
        return self.stored("lora_b")

    @property
    def dash_sigma(self) -> Tensor:  # type: ignore[override]
        return self._of_s("dash_sigma", 0)

    @property
    def dash_u(self) -> Tensor:  # type: ignore[override]
        return self._of_s("dash_u", 1)

    @property
    def dash_vt(self) -> Tensor:  # type: ignore[override]
        return self._of_s("dash_vt", 0)

    @property
    def scaling(self) -> float:
        return self.config.scaling

    @scaling.setter
    def scaling(self, value: float) -> None:
        rank = self.config.r
        self.config = dataclasses.replace(self.config, alpha=value * rank, use_rslora=False)

    def drop_probability(self) -> float:
        """The p of their dropout module as it is now."""
        return float(getattr(self.lora_dropout, "p", 0.0))

    def is_launched(self) -> bool:
        """`launched`, read from the device only after somebody wrote it."""
        flag = self.launched
        if self._seen[:2] != (id(flag), flag._version):
            self._seen = id(flag), flag._version, bool(flag)
        return self._seen[2]

    def note_phase(self, launched: bool, calls: int) -> None:
        """Sets the phase, and FLAG as theirs has it."""
        self.launched.fill_(launched)
        self.FLAG = self.warmup + 1 if launched else min(calls, self.warmup)

    def calls(self) -> int:
        """How far the warm-up is: forward calls, or, where a schedule counts, its optimizer steps."""
        return self.FLAG if self.semantics == "authors" or self.run is None else self.run.step

    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """input (..., K) to (..., N)."""
        if args or kwargs:
            raise TypeError(f"{self._label()} takes one tensor, got further arguments {[*args, *kwargs]}")
        if not self.enabled or self._unmerged is not None or self.__dict__.get("disable_adapters", False):
            return self._base_output(input)
        if self.semantics == "loradash":
            self._remind()
            # Before launch U and V are zero: nothing branches.
            return self._product(input, dash=True)
        if not self.is_launched():
            self._refuse_shards()
            if self._counts_on():
                return self._product(input, dash=False)
            self._launch_itself()
        elif self._fresh:
            self._check_kept()
        if not (self.training and self.drop_probability()):
            return self._product(input, dash=True)
        return self._dash_term(self._product(input, dash=False), input)

    def _base_output(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight_nk(), self.bias)

    def _counts_on(self) -> bool:
        """Counts a call in the warm-up. False where it is over. A checkpoint's recomputation is no call of its own."""
        # Inside of backward there is a graph task.
        recomputed = torch._C._current_graph_task_id() != -1
        if not recomputed and self.warmup <= self.FLAG:
            return False
        self.FLAG += not recomputed
        return True

    def _product(self, x: Tensor, dash: bool) -> Tensor:
        """Base product, LoRA term and, with `dash`, the term of the directions under the same mask."""
        try:
            return dash_linear(x, self.weight_nk(), self.bias, **self._terms(dash))
        except ValueError as error:
            self._fail(error, self.weight_nk())

    def _terms(self, dash: bool) -> dict[str, Any]:
        terms: dict[str, Any] = {
            "lora_a": self.lora_a,
            "lora_b": self.lora_b,
            "scaling": self.config.scaling,
            "dropout_p": self.drop_probability(),
            "training": self.training,
        }
        if dash:
            # U and V are parameters of theirs, which their code freezes in its own time.
            u, vt = self.dash_u.detach(), self.dash_vt.detach()
            terms |= {"dash_u": u, "dash_vt": vt, "dash_sigma": self.dash_sigma}
        return terms

    def _dash_term(self, y: Tensor, x: Tensor) -> Tensor:
        """y plus the term of the directions under a mask of its own: Vᵀ and U Δσ take the places of A and B."""
        return low_rank_update(
            y,
            x,
            lora_a=self.dash_vt.detach(),
            lora_b=self.dash_u.detach() * self.dash_sigma,
            dropout_p=self.drop_probability(),
            training=True,
        )

    @torch.no_grad()
    def _launch_itself(self) -> None:
        """As theirs does in the call after the warm-up: all triplets, rates without eps."""
        with torch.autocast(self.lora_a.device.type, enabled=False):
            found = task_specific_directions(
                self.weight_nk(),
                self.lora_a,
                self.lora_b,
                self.dash_sigma.numel(),
                scaling=self.scaling,
                eps=0.0,
                method="exact",
            )
        super().launch(found)
        self.note_phase(True, self.FLAG)
        self._fresh = True

    def _refuse_shards(self) -> None:
        """Of layers that launch in forward one asks, once, whether what they write there will stay."""
        if not self.reminded and self.run is not None:
            cast(Any, self.run).refuse_shards()
            self.reminded = True

    def _check_kept(self) -> None:
        """In the call after launch: whoever shards parameters (FSDP) around the model takes away what forward wrote into them."""
        if not bool(self.dash_u.any()):
            raise RuntimeError(
                f"{self._label()}: the directions that its launch wrote are gone, since a framework shards its parameters (FSDP) "
                "and takes its own again after each call; take semantics='loradash', whose DashSchedule launches between steps"
            )
        self._fresh = False

    def launch(self, directions: Directions) -> None:
        """As `DashLinear.launch`. Raises ValueError for the authors' semantics, where the layer launches itself."""
        if self.semantics == "authors":
            raise ValueError(
                f"{self._label()} counts forward calls and launches itself (semantics='authors'); for DashSchedule and "
                "prelaunch give semantics='loradash'"
            )
        # U and V are parameters here, and FSDP2 shards those.
        u, vt = shard_of(directions.u, self.dash_u), shard_of(directions.vt, self.dash_vt)
        super().launch(directions._replace(u=u, vt=vt))
        self.note_phase(True, self.FLAG)

    def _remind(self) -> None:
        """Says once where nothing will ever launch this layer: theirs needs no schedule, and ours does."""
        if self.reminded or not (self.training and torch.is_grad_enabled()) or torch.compiler.is_compiling():
            return
        self.reminded = True
        if not (self.run is not None and self.run.schedules) and not self.is_launched():
            warnings.warn(
                f"loradash: {self._label()} trains as plain LoRA, since no DashSchedule was made for its model: "
                "mark_only_lora_as_trainable(model), then DashSchedule(model), and step it after every optimizer step; or "
                "take semantics='authors', which counts forward calls",
                stacklevel=4,
            )

    def train(self, mode: bool = True) -> AuthorsLayer:
        """As theirs, where `merge_weights` merges in eval; back in train the weight is the old one bit for bit."""
        nn.Module.train(self, mode)
        if self._merges():
            self.unmerge() if mode else self.merge()
        return self

    def eval(self) -> AuthorsLayer:
        return self.train(False)

    def _merges(self) -> bool:
        return self.merges_in_eval and bool(self.merge_weights)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self._merges() and self._unmerged is not None:
            # Merged or not is a matter of eval and train here, and no business of the file.
            weight = cast(Tensor, self._unmerged)
            destination[f"{prefix}weight"] = weight if keep_vars else weight.detach()
            getattr(destination, "_metadata", {}).get(prefix[:-1], {}).pop("merged", None)
        destination[prefix + FLAG] = self.flag()

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: Any) -> None:
        merged = self._merges() and self.merged
        if merged:
            self.unmerge()
        found = {key: value for key, value in state_dict.items() if key.startswith(prefix)}
        keys = {part: prefix + suffix for part, suffix in KEYS[self.dialect].items()}
        parts = {part: found[key] for part, key in keys.items() if key in found}
        for part in ("flag", "sigma", "delta"):
            found.pop(keys.get(part, ""), None)
        has_adapter = "dash_sigma" in parts
        if has_adapter and "dash_u" not in parts:
            weight = found.get(f"{prefix}weight", self.weight)
            try:
                u, vt = self._lost_directions(parts, weight)
                found |= {keys["dash_u"]: u, keys["dash_vt"]: vt}
            except ValueError as error:
                # The last argument is the list of errors.
                args[-1].append(f"{prefix[:-1]}: {error}")
        super()._load_from_state_dict(found, prefix, *args)
        if has_adapter:
            self.note_loaded(parts.get("flag"), found.get(keys["dash_u"], self.dash_u))
        if merged:
            self.merge()

    def flag(self) -> Tensor:
        """What a state dict keeps under `dialects.FLAG`."""
        return torch.tensor([self.calls(), int(self.is_launched())])

    def note_loaded(self, flag: Tensor | None, u: Tensor) -> None:
        """Takes phase and count from a state dict's flag; where the authors' code wrote it there is none, and its U tells."""
        if flag is not None and flag.shape != (2,):
            raise ValueError(f"{self._label()}: {FLAG} has shape {tuple(flag.shape)}, wanted (2,)")
        launched, calls = (bool(flag[1]), int(flag[0])) if flag is not None else (bool(u.any()), 0)
        self.note_phase(launched, calls)
        if flag is not None and self.semantics == "loradash" and self.run is not None:
            self.run.step = calls

    def _lost_directions(self, parts: Mapping[str, Tensor], weight: Tensor) -> tuple[Tensor, Tensor]:
        """U and Vᵀ where a state dict left them out, in the shapes of theirs; zeros before launch."""
        s = self.dash_sigma.numel()
        names = " and ".join(KEYS[self.dialect][part] for part in ("dash_u", "dash_vt"))
        u, vt = (parts["dash_sigma"].new_zeros(self.stored(part).shape) for part in ("dash_u", "dash_vt"))
        parts = {"lora_a": self.lora_a, "lora_b": self.lora_b, **parts}
        u[:, :s], vt[:s] = lost_directions(parts, weight, s, names)
        return u, vt


_CLASSES: dict[tuple[type[nn.Module], type[nn.Module]], type[nn.Module]] = {}


def patched_class(kind: type[nn.Module], theirs: type[nn.Module]) -> type[nn.Module]:
    """The class of a layer of theirs that computes as `kind` does: of both, under the name of theirs."""
    if (kind, theirs) not in _CLASSES:
        names = {name: getattr(theirs, name) for name in ("__module__", "__qualname__", "__doc__")}
        own = {"origin": (kind, theirs), "__reduce_ex__": _reduced}
        _CLASSES[kind, theirs] = type(theirs.__name__, (kind, theirs), {**names, **own})
    return _CLASSES[kind, theirs]


def _reduced(layer: nn.Module, protocol: Any) -> tuple:
    return _rebuilt, type(layer).origin, layer.__dict__  # type: ignore[attr-defined]


def _rebuilt(kind: type[nn.Module], theirs: type[nn.Module]) -> nn.Module:
    """An empty layer of a patched class, which pickle and copy fill: they cannot find a class that has no place in a module."""
    cls = patched_class(kind, theirs)
    return cls.__new__(cls)
