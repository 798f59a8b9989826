"""Gradients: the only file that saves tensors.

One setup_context and one backward per operator, used twice: by a torch.autograd.Function, which eager calls take (about
half the overhead), and by register_autograd on the operator, which compile, export and opcheck take. Saved for backward:
x (an alias), P in fp32, the parameters and 16 bytes of seed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import ops

_TWICE = "loradash: second derivatives are not implemented; the gradients of dash_linear cannot be differentiated again"


def _gradients(direct: bool, *args: Any) -> tuple[Tensor, ...]:
    """The backward operator: called directly where forward was and dy is plain, through the dispatcher where something must
    see it."""
    dy, x = args[0], args[1]
    if forward_ad._current_level >= 0 and forward_ad.unpack_dual(dy).tangent is not None:
        raise RuntimeError("loradash: the gradients of dash_linear have no forward-mode derivatives")
    if (
        not direct
        or type(dy) is not Tensor
        or type(x) is not Tensor  # a hook on saved tensors may give back what it likes
        or torch.is_grad_enabled()
        or torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._are_functorch_transforms_active()
        or torch._C._functorch.is_legacy_batchedtensor(dy)
    ):
        return torch.ops.loradash.dash_linear_backward(*args)
    return ops.dash_linear_backward(*args)


def _refuse_frozen(ctx: Any, **indices: int) -> None:
    """Raises ValueError where a gradient is wanted that no kernel computes."""
    for name, index in indices.items():
        if ctx.needs_input_grad[index]:
            raise ValueError(f"{name} requires grad, and is frozen in a LoRA-Dash layer: {name}.requires_grad_(False)")


def _save(
    ctx: Any, x: Tensor, weight: Tensor | None, adapters: tuple, p: Tensor, seed: Tensor | None, options: tuple
) -> None:
    ctx.save_for_backward(x, weight, *adapters, p, seed)
    ctx.options = options
    ctx.mark_non_differentiable(p)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dy: Tensor, needs: list[bool]) -> tuple[Tensor | None, ...]:
    """Gradients of x, A, B, sigma and bias, in the dtypes of those tensors (bias apart), None where not needed."""
    x, weight, lora_a, lora_b, dash_u, dash_vt, dash_sigma, p, seed = ctx.saved_tensors
    scaling, threshold, backend = ctx.options
    direct = getattr(ctx, "direct", False)
    grads = _gradients(
        direct, dy, x, weight, lora_a, lora_b, dash_u, dash_vt, dash_sigma, p, seed, scaling, threshold, needs, backend
    )
    like = (x, lora_a, lora_b, dash_sigma, None)
    return tuple(
        None if not n else g if t is None or g.dtype == t.dtype else g.to(t.dtype)
        for g, t, n in zip(grads, like, needs, strict=True)
    )


# --- dash_linear -----------------------------------------------------------------------------------------------------


def _dash_linear_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    _refuse_frozen(ctx, weight=1, dash_u=5, dash_vt=6)
    x, weight, bias, lora_a, lora_b, dash_u, dash_vt, dash_sigma, seed, *options = inputs
    ctx.bias_dtype = None if bias is None else bias.dtype
    _save(ctx, x, weight, (lora_a, lora_b, dash_u, dash_vt, dash_sigma), output[1], seed, tuple(options))


def _dash_linear_backward(ctx: Any, dy: Tensor | None, dp: Tensor | None) -> tuple[Tensor | None, ...]:
    if dy is None:
        return (None,) * 12
    need = ctx.needs_input_grad
    dx, da, db_lora, dsigma, dbias = _backward(ctx, dy, [need[0], need[3], need[4], need[7], need[2]])
    if dbias is not None:
        dbias = dbias.to(ctx.bias_dtype)
    return dx, None, dbias, da, db_lora, None, None, dsigma, None, None, None, None


# --- low_rank_update -------------------------------------------------------------------------------------------------


def _low_rank_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    _refuse_frozen(ctx, dash_u=4, dash_vt=5)
    _, x, lora_a, lora_b, dash_u, dash_vt, dash_sigma, seed, *options = inputs
    _save(ctx, x, None, (lora_a, lora_b, dash_u, dash_vt, dash_sigma), output[1], seed, tuple(options))


def _low_rank_backward(ctx: Any, dout: Tensor | None, dp: Tensor | None) -> tuple[Tensor | None, ...]:
    if dout is None:
        return (None,) * 11
    need = ctx.needs_input_grad
    dx, da, db_lora, dsigma, _ = _backward(ctx, dout, [need[1], need[2], need[3], need[6], False])
    dy = dout if need[0] else None
    return dy, dx, da, db_lora, None, None, dsigma, None, None, None, None


# --- the two users of each pair --------------------------------------------------------------------------------------


def _function(name: str, plain: Any, context: Any, backward: Any) -> Any:
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor]:
        # Not the separate setup_context of torch.autograd.Function: it binds the signature in every call, 40 us.
        output = plain(*args)
        context(ctx, args, output)
        ctx.direct = True
        return output

    return type(
        name, (torch.autograd.Function,), {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    )


DashLinearFunction = _function("DashLinearFunction", ops.dash_linear, _dash_linear_context, _dash_linear_backward)
LowRankUpdateFunction = _function("LowRankUpdateFunction", ops.low_rank_update, _low_rank_context, _low_rank_backward)

torch.library.register_autograd(
    "loradash::dash_linear", _dash_linear_backward, setup_context=_dash_linear_context, lib=ops.LIBRARY
)
torch.library.register_autograd(
    "loradash::low_rank_update", _low_rank_backward, setup_context=_low_rank_context, lib=ops.LIBRARY
)


def _no_second_derivative(ctx: Any, *grads: Tensor) -> tuple[None, ...]:
    raise RuntimeError(_TWICE)


torch.library.register_autograd("loradash::dash_linear_backward", _no_second_derivative, lib=ops.LIBRARY)
