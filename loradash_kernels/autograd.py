"""Gradients: the only file that saves tensors.

One setup_context and one backward per operator, used twice: by a torch.autograd.Function, which eager calls take (about
half the overhead), and by register_autograd on the operator, which compile, export and opcheck take. Saved for backward:
x (an alias), P in fp32, the parameters and 16 bytes of seed.
"""

from __future__ import annotations

from operator import itemgetter
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import ops

_TWICE = "loradash: second derivatives are not implemented; the gradients of dash_linear cannot be differentiated again"

# The arguments whose gradients the backward operator gives, in its order, and those that it takes from the forward pass.
_LEAVES = ("x", "lora_a", "lora_b", "dash_sigma", "bias")
_SAVED = ("x", "weight", "lora_a", "lora_b", "dash_u", "dash_vt", "dash_sigma")
_FROZEN = ("weight", "dash_u", "dash_vt")
_OPTIONS = ("scaling", "threshold", "backend")


def _gradients(direct: bool, *args: Any) -> tuple[Tensor, ...]:
    """The backward operator: called directly where forward was and dy is plain, through the dispatcher where something must
    see it."""
    dy, x = args[0], args[1]
    if forward_ad._current_level >= 0 and forward_ad.unpack_dual(dy).tangent is not None:
        raise RuntimeError("loradash: the gradients of dash_linear have no forward-mode derivatives")
    if (
        not direct
        or type(dy) is not Tensor
        # A hook on saved tensors may give back what it likes.
        or type(x) is not Tensor
        or torch.is_grad_enabled()
        or torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._are_functorch_transforms_active()
        or torch._C._functorch.is_legacy_batchedtensor(dy)
    ):
        return torch.ops.loradash.dash_linear_backward(*args)
    return ops.dash_linear_backward(*args)


class _Rule:
    """The setup_context and the backward of one forward operator, whose arguments are found by their names."""

    def __init__(self, operator: torch._ops.OpOverloadPacket) -> None:
        names = [argument.name for argument in operator.default._schema.arguments]
        self.count = len(names)

        def places(wanted: tuple[str, ...]) -> tuple[int, ...]:
            """Of an argument that this operator has not: one behind the last, where there is None."""
            return tuple(names.index(name) if name in names else self.count for name in wanted)

        self.frozen = [(name, names.index(name)) for name in _FROZEN if name in names]
        self.leaves = places(_LEAVES)
        self.base, self.seed = places(("y",))[0], names.index("seed")
        self.leaves_of, self.saved_of = itemgetter(*self.leaves), itemgetter(*places(_SAVED))
        self.options_of = itemgetter(*places(_OPTIONS))

    def setup_context(self, ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
        """Raises ValueError where a gradient is wanted that no kernel computes."""
        needs, inputs, p = ctx.needs_input_grad, (*inputs, None), output[1]
        for name, place in self.frozen:
            if needs[place]:
                raise ValueError(
                    f"{name} requires grad, and is frozen in a LoRA-Dash layer: {name}.requires_grad_(False)"
                )
        ctx.save_for_backward(*self.saved_of(inputs), p, inputs[self.seed])
        ctx.options = self.options_of(inputs)
        bias = self.leaves_of(inputs)[4]
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.mark_non_differentiable(p)
        ctx.set_materialize_grads(False)

    def backward(self, ctx: Any, dy: Tensor | None, dp: Tensor | None) -> tuple[Tensor | None, ...]:
        """A gradient for every argument, in the dtype of that argument, None where there is none or none is needed."""
        found: list[Tensor | None] = [None] * (self.count + 1)
        if dy is None:
            return tuple(found[:-1])
        *tensors, seed = ctx.saved_tensors
        x, _, lora_a, lora_b, _, _, dash_sigma, _ = tensors
        scaling, threshold, backend = ctx.options
        needed = (*ctx.needs_input_grad, False)
        needs = list(self.leaves_of(needed))
        grads = _gradients(getattr(ctx, "direct", False), dy, *tensors, seed, scaling, threshold, needs, backend)
        dtypes = (
            x.dtype,
            lora_a.dtype,
            lora_b.dtype,
            None if dash_sigma is None else dash_sigma.dtype,
            ctx.bias_dtype,
        )
        for place, grad, dtype, need in zip(self.leaves, grads, dtypes, needs, strict=True):
            if need:
                found[place] = grad if grad.dtype == dtype else grad.to(dtype)
        if needed[self.base]:
            found[self.base] = dy
        return tuple(found[:-1])

    def function(self, name: str, plain: Any) -> Any:
        """The torch.autograd.Function around `plain`, which computes the operator's outputs without the dispatcher."""

        def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor]:
            # Not the separate setup_context of torch.autograd.Function: it binds the signature in every call, 40 us.
            output = plain(*args)
            self.setup_context(ctx, args, output)
            ctx.direct = True
            return output

        members = {"forward": staticmethod(forward), "backward": staticmethod(self.backward)}
        return type(name, (torch.autograd.Function,), members)


_dash_linear, _low_rank_update = _Rule(torch.ops.loradash.dash_linear), _Rule(torch.ops.loradash.low_rank_update)
DashLinearFunction = _dash_linear.function("DashLinearFunction", ops.dash_linear)
LowRankUpdateFunction = _low_rank_update.function("LowRankUpdateFunction", ops.low_rank_update)

for _name, _rule in (("dash_linear", _dash_linear), ("low_rank_update", _low_rank_update)):
    torch.library.register_autograd(
        f"loradash::{_name}", _rule.backward, setup_context=_rule.setup_context, lib=ops.LIBRARY
    )


def _no_second_derivative(ctx: Any, *grads: Tensor) -> tuple[None, ...]:
    raise RuntimeError(_TWICE)


torch.library.register_autograd("loradash::dash_linear_backward", _no_second_derivative, lib=ops.LIBRARY)
