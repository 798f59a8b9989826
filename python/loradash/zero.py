"""What DeepSpeed's ZeRO does to parameters, and how it is undone for a moment.

Stage 3 keeps of every parameter the part of this process (`ds_tensor`) and leaves its data empty between uses; `ds_shape` is
the shape. Every stage trains float32 copies of its own, flat and in parts, one a parameter group: a write to a parameter has to
reach them, and an optimizer of torch.optim has nothing else. All of this is read from what DeepSpeed leaves on parameters
and engines; it is imported only where such a parameter was found.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

# Where the stages keep the parameters of a group (stage 3: of a part of a group) and their flat copy.
_GROUPS = (("fp16_groups", "fp32_partitioned_groups_flat"), ("bit16_groups", "single_partition_of_fp32_groups"))
# DeepSpeed counts here how many of the user's GatheredParameters hold a parameter.
_HELD_BY_USER = "_ds_z3_gathered_param_context_depth"


def is_partitioned(t: Tensor) -> bool:
    """Is it a parameter of ZeRO-3, of which this process may hold a part only?"""
    return hasattr(t, "ds_id")


def is_trained_by_zero(t: Tensor) -> bool:
    """Has a ZeRO optimizer of any stage a float32 copy of this parameter?"""
    return hasattr(t, "_z3_optimizer") or hasattr(t, "_hp_mapping")


def number_of_elements(t: Tensor) -> int:
    """Of the whole tensor, which may be a parameter of ZeRO-3."""
    return int(getattr(t, "ds_numel", t.numel()))


def whole_shape(t: Tensor) -> torch.Size:
    """The shape of a tensor that may be a parameter of ZeRO-3."""
    return torch.Size(getattr(t, "ds_shape", t.shape))


def _is_gathered_by_user(t: Tensor) -> bool:
    return getattr(t, _HELD_BY_USER, 0) > 0


def gather(t: Tensor) -> Tensor:
    """A parameter of ZeRO-3, whole, as a tensor of its own: every process must call this."""
    from deepspeed.runtime.zero import GatheredParameters

    if _is_gathered_by_user(t):
        return t.detach().clone()
    with GatheredParameters([t]):
        return t.detach().clone()


@torch.no_grad()
def write(t: Tensor, values: Tensor) -> None:
    """Writes whole values, those of process 0, into a parameter of ZeRO-3: every process must call this.

    Raises RuntimeError inside deepspeed.zero.GatheredParameters, which would keep or drop the values as it was told.
    """
    from deepspeed.runtime.zero import GatheredParameters

    if _is_gathered_by_user(t):
        raise RuntimeError("parameters are written by a call outside of deepspeed.zero.GatheredParameters")
    with GatheredParameters([t], modifier_rank=0):
        t.copy_(values)


@torch.no_grad()
def renew_copy(t: Tensor) -> None:
    """Gives ZeRO's float32 copy of a parameter, where there is one, the values that were just written to the parameter."""
    if hasattr(t, "_z3_optimizer"):
        from deepspeed.utils import safe_set_local_fp32_param

        if t.requires_grad:
            part: Any = t.ds_tensor  # type: ignore[attr-defined]
            safe_set_local_fp32_param(t, part.detach().float())
    elif getattr(t, "_hp_mapping", None) is not None:
        t._hp_mapping.update_hp()  # type: ignore[attr-defined]


def own_part(t: Tensor) -> Tensor:
    """A copy of this process's part of a frozen parameter of ZeRO-3, for `put_back`. ValueError where it is not here."""
    part: Any = t.ds_tensor  # type: ignore[attr-defined]
    if part.numel() != part.ds_numel or getattr(t, "ds_secondary_tensor", None) is not None:
        raise ValueError(
            "a weight that ZeRO-3 keeps elsewhere (offloaded to NVMe, or a second time by zero_hpz_partition_size) cannot be "
            "merged in place: save_adapter(model, path), then merge(load_adapter(plain_model, path))"
        )
    return part.detach().clone()


@torch.no_grad()
def put_back(t: Any, part: Tensor) -> None:
    """Makes `own_part`'s copy this process's part again, bit for bit."""
    # Small parameters stay gathered, and are then read instead of the part.
    t.partition()
    t.ds_tensor.copy_(part)


def engines() -> list[type[nn.Module]]:
    """DeepSpeed's class of engines, where DeepSpeed was imported."""
    kind = getattr(sys.modules.get("deepspeed"), "DeepSpeedEngine", None)
    return [] if kind is None else [kind]


def engine_in(model: nn.Module) -> Any:
    """The DeepSpeedEngine around or in a model, or None."""
    kinds = tuple(engines())
    return next((m for m in model.modules() if isinstance(m, kinds)), None) if kinds else None


class FlatGroups:
    """The flat copies that an engine's optimizer steps on, and what of the model each stands for.

    Attributes:
        optimizer: that of torch.optim inside.
    """

    def __init__(self, zero: Any) -> None:
        self._zero = zero
        self.optimizer: torch.optim.Optimizer = zero.optimizer

    @classmethod
    def of(cls, engine: Any) -> FlatGroups | None:
        """None where the engine steps on the parameters themselves. ValueError for an optimizer that is not known."""
        zero = getattr(engine, "optimizer", None)
        if zero is None or isinstance(zero, torch.optim.Optimizer):
            return None
        if not any(hasattr(zero, name) for _, name in _GROUPS):
            raise ValueError(
                f"DeepSpeed trains by a {type(zero).__name__}, which keeps copies of the parameters in a way that is not known "
                "here; use ZeRO stage 1, 2 or 3"
            )
        return cls(zero)

    def _members(self) -> list[tuple[list[Tensor], Tensor]]:
        parameters, flat = next(names for names in _GROUPS if hasattr(self._zero, names[1]))
        return list(zip(getattr(self._zero, parameters), getattr(self._zero, flat), strict=True))

    def check(self, adapters: Mapping[str, Tensor], sigmas: Mapping[str, Tensor], launched: bool) -> None:
        """Can these adapters train here as in one process? Raises ValueError where not.

        Args:
            adapters, sigmas: A and B, and Δσ, by name.
        """
        groups = self._members()
        known = {id(p) for parameters, _ in groups for p in parameters}
        absent = [n for n, p in {**adapters, **sigmas}.items() if p.requires_grad and id(p) not in known]
        if absent:
            raise ValueError(
                f"DeepSpeed's optimizer has not got {', '.join(absent[:4])}: call apply_dash, then make the optimizer, then "
                "deepspeed.initialize"
            )
        ours = {id(p) for p in sigmas.values()}
        mixed = [parameters for parameters, _ in groups if 0 < sum(id(p) in ours for p in parameters) < len(parameters)]
        if mixed and not launched:
            raise ValueError(
                "Δσ shares a parameter group with others, and ZeRO makes one flat tensor of a group, with one step count: Adam "
                "would begin Δσ as if it had trained from the start. Give deepspeed.initialize an optimizer of "
                "dash_parameter_groups(model, lr), or model_parameters=dash_parameter_groups(model, lr)"
            )

    def hold_back(self, sigmas: Mapping[str, Tensor]) -> None:
        """Keeps the optimizer's next step from Δσ, which has groups of its own (`check`)."""
        ours = {id(p) for p in sigmas.values()}
        for parameters, flat in self._members():
            if parameters and id(parameters[0]) in ours:
                flat.grad = None
