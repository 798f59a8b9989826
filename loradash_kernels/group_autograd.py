"""Gradients of a group: one node for the outputs of several layers that share x.

As in `autograd`, one setup_context and one backward are used twice, by a torch.autograd.Function and by the operator.
Saved for backward: x (an alias), one P in fp32 for all members, their parameters and 16 bytes of seed; separate layers save
the same P in parts, and a seed each.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import checkpointing, ops
from .autograd import must_dispatch

# The lists of the operator, in the order of its schema, and those whose gradients the backward operator gives, in its order.
LISTS = ("weight", "bias", "lora_a", "lora_b", "dash_u", "dash_vt", "dash_sigma")
_LEAVES = ("lora_a", "lora_b", "dash_sigma", "bias")
_FROZEN = ("weight", "dash_u", "dash_vt")
_SAVED = ("weight", "lora_a", "lora_b", "dash_u", "dash_vt", "dash_sigma")

Lists = dict[str, list[Tensor]]


def _lists(flat: Any, count: int) -> dict[str, Any]:
    """The parts of what lies side by side, `count` of each list, by name."""
    return {name: list(flat[i * count : (i + 1) * count]) for i, name in enumerate(LISTS)}


def _save(ctx: Any, x: Tensor, lists: Lists, p: Tensor, seed: Tensor | None, options: tuple) -> None:
    """Saves what backward needs. Raises ValueError where a gradient is wanted that no kernel computes."""
    count = len(lists["weight"])
    # Whatever follows the lists needs none.
    needs = _lists(ctx.needs_input_grad[1:], count)
    for name in _FROZEN:
        if any(needs[name]):
            raise ValueError(
                f"{name} of member {needs[name].index(True)} requires grad, and is frozen in a LoRA-Dash layer: "
                f"{name}.requires_grad_(False)"
            )
    ctx.save_for_backward(x, *(t for name in _SAVED for t in lists[name]), p, seed)
    ctx.count, ctx.options = count, options
    ctx.dtypes = [t.dtype for name in _LEAVES for t in lists[name]]


def _mark(ctx: Any, p: Tensor) -> None:
    ctx.mark_non_differentiable(p)
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, dys: list[Tensor | None], needs_x: bool, needs: dict[str, list[bool]]) -> tuple[Any, Any]:
    """dx, and the gradients of the lists by name, in the dtypes of their tensors; None where there is none."""
    count, (scaling, threshold, backend) = ctx.count, ctx.options
    found: dict[str, list[Tensor | None]] = {name: [None] * count for name in LISTS}
    # A member whose output nobody used has no gradients.
    used = [i for i in range(count) if dys[i] is not None]
    if not used:
        return None, found
    x, *tensors, p, seed = ctx.saved_tensors
    saved = {name: tensors[i * count : (i + 1) * count] for i, name in enumerate(_SAVED)}
    if len(used) < count:
        parts = p.split([a.shape[0] + s.shape[0] for a, s in zip(saved["lora_a"], saved["dash_sigma"], strict=True)], 1)
        p = torch.cat([parts[i] for i in used], 1)
    taken = [[saved[name][i] for i in used] for name in _SAVED]
    wanted = [needs_x, *(needs[name][i] for name in _LEAVES for i in used)]
    args = ([dys[i] for i in used], x, *taken, p, seed, [scaling[i] for i in used], threshold, wanted, backend)
    direct = getattr(ctx, "direct", False)
    dispatch = any(must_dispatch(direct, dy, x) for dy in args[0])
    dx, *kinds = (torch.ops.loradash if dispatch else ops).dash_linear_group_backward(*args)
    for place, (name, grads) in enumerate(zip(_LEAVES, kinds, strict=True)):
        for i, grad in zip(used, grads, strict=True):
            if needs[name][i]:
                dtype = ctx.dtypes[place * count + i]
                found[name][i] = grad if grad.dtype == dtype else grad.to(dtype)
    return (dx if needs_x else None), found


class GroupFunction(torch.autograd.Function):
    """What eager training takes. Arguments: x, the lists one behind the other, seed, scaling, threshold, backend."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *args: Any) -> tuple[Tensor, ...]:
        *flat, seed, scaling, threshold, backend = args
        lists = _lists(flat, len(scaling))
        y, p = ops.dash_linear_group(x, *lists.values(), seed, scaling, threshold, backend)
        _save(ctx, x, lists, p, seed, (scaling, threshold, backend))
        _mark(ctx, p)
        ctx.direct = True
        return (*y, p)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        needs_x, *flat = ctx.needs_input_grad
        dx, found = _gradients(ctx, list(grads[:-1]), needs_x, _lists(flat, ctx.count))
        return (dx, *(grad for name in LISTS for grad in found[name]), None, None, None, None)


class _Saving(torch.autograd.Function):
    """A function of the arguments and of their P that saves what `GroupFunction` does, and computes nothing."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *args: Any) -> Tensor:
        *flat, seed, scaling, threshold, backend, p = args
        _save(ctx, x, _lists(flat, len(scaling)), p, seed, (scaling, threshold, backend))
        return p.new_empty(())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise RuntimeError("loradash: gradients of a recomputation")


class Group:
    """How a group is called. args: those of `GroupFunction`; the results are every y, and P."""

    saving = _Saving

    @staticmethod
    def packet(x: Tensor, *args: Any) -> tuple[Tensor, ...]:
        """By the dispatcher."""
        *flat, seed, scaling, threshold, backend = args
        lists = _lists(flat, len(scaling))
        y, p = torch.ops.loradash.dash_linear_group(x, *lists.values(), seed, scaling, threshold, backend)
        return (*y, p)

    @staticmethod
    def run(x: Tensor, *args: Any) -> tuple[Tensor, ...]:
        """Without gradients and without the dispatcher."""
        *flat, seed, scaling, threshold, backend = args
        y, p = ops.dash_linear_group(x, *_lists(flat, len(scaling)).values(), seed, scaling, threshold, backend)
        return (*y, p)

    def call(self, dispatch: bool, args: tuple) -> list[Tensor]:
        """Every y."""
        differentiated = torch.is_grad_enabled() and any(t.requires_grad for t in args[:-4])
        by = self.packet if dispatch else GroupFunction.apply if differentiated else self.run
        region = None if torch.compiler.is_compiling() or not differentiated else checkpointing.HERE.region
        found = by(*args) if region is None else region.call(self, by, args)
        return list(found[:-1])

    @staticmethod
    def seed_of(args: tuple) -> Tensor | None:
        return args[-4]

    @staticmethod
    def with_seed(args: tuple, seed: Tensor | None) -> tuple:
        """The arguments with this seed."""
        return (*args[:-4], seed, *args[-3:])

    @staticmethod
    def shape_of_p(args: tuple) -> tuple[int, int]:
        """(M, R), of all members together."""
        x, *flat = args[:-4]
        lists = _lists(flat, len(args[-3]))
        return x.shape[0], sum(t.shape[0] for t in (*lists["lora_a"], *lists["dash_sigma"]))


GROUP = Group()


def setup_context(ctx: Any, inputs: tuple, output: tuple[list[Tensor], Tensor]) -> None:
    """What the operator saves."""
    x, *lists, seed, scaling, threshold, backend = inputs
    _save(ctx, x, dict(zip(LISTS, lists, strict=True)), output[1], seed, (scaling, threshold, backend))
    _mark(ctx, output[1])


def backward(ctx: Any, dys: list[Tensor | None], dp: Tensor | None) -> tuple[Any, ...]:
    """A gradient, or a list of them, for every argument of the operator."""
    needs_x, *lists = ctx.needs_input_grad[: 1 + len(LISTS)]
    dx, found = _gradients(ctx, dys, needs_x, dict(zip(LISTS, lists, strict=True)))
    return (dx, *(found[name] for name in LISTS), None, None, None, None)


torch.library.register_autograd("loradash::dash_linear_group", backward, setup_context=setup_context, lib=ops.LIBRARY)
