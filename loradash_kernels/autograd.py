"""Gradients: the only file that saves tensors.

One setup_context and one backward per operator, used twice: by a torch.autograd.Function, which eager calls take (about
half the overhead), and by register_autograd on the operator, which compile, export and opcheck take. Saved for backward:
x (an alias), P in fp32, the parameters and 16 bytes of seed.
"""

from __future__ import annotations

from collections.abc import Callable
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import checkpointing, ops

TWICE = "loradash: second derivatives are not implemented; the gradients of dash_linear cannot be differentiated again"

# The arguments whose gradients the backward operator gives, in its order, and those that it takes from the forward pass.
_LEAVES = ("x", "lora_a", "lora_b", "dash_sigma", "bias")
_SAVED = ("x", "weight", "lora_a", "lora_b", "dash_u", "dash_vt", "dash_sigma")
_FROZEN = ("weight", "dash_u", "dash_vt")


def must_dispatch(direct: bool, dy: Tensor, x: Tensor) -> bool:
    """Must something see the backward operator, or was forward called by the dispatcher (not `direct`)?"""
    if forward_ad._current_level >= 0 and forward_ad.unpack_dual(dy).tangent is not None:
        raise RuntimeError("loradash: the gradients of dash_linear have no forward-mode derivatives")
    return bool(
        not direct
        or type(dy) is not Tensor
        # A hook on saved tensors may give back what it likes.
        or type(x) is not Tensor
        or torch.is_grad_enabled()
        or torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._are_functorch_transforms_active()
        or torch._C._functorch.is_legacy_batchedtensor(dy)
    )


class Operator:
    """A forward operator with its gradients. Its arguments are found by their names in the schema.

    packet: what the dispatcher calls. run: the same without the dispatcher. function: `run` as a torch.autograd.Function.
    backward_packet, run_backward: the same two of the backward operator, which takes dy, what `saved` names, P, the seed and
    the options.
    """

    saved: tuple[str, ...] = _SAVED
    backward_packet: torch._ops.OpOverloadPacket = torch.ops.loradash.dash_linear_backward
    run_backward = staticmethod(ops.dash_linear_backward)

    def __init__(self, packet: torch._ops.OpOverloadPacket, run: Callable[..., tuple[Tensor, Tensor]]) -> None:
        schema = packet.default._schema.arguments
        names = [argument.name for argument in schema]
        self.packet, self.run, self.count = packet, run, len(names)

        def places(*wanted: str) -> tuple[int, ...]:
            """Where these arguments stand. One that this operator lacks stands behind the last, where None is put."""
            return tuple(names.index(name) if name in names else self.count for name in wanted)

        # Those that the caller gave; numbers may be symbols of a compiler.
        self.tensors = [(a.name, i) for i, a in enumerate(schema) if "Tensor" in str(a.type) and a.name != "seed"]
        self.frozen = [(name, names.index(name)) for name in _FROZEN if name in names]
        self.seed, self.bias, self.base = places("seed", "bias", "y")
        self.leaves = places(*_LEAVES)
        self.seed_of = itemgetter(self.seed)
        self.leaves_of, self.saved_of = itemgetter(*self.leaves), itemgetter(*places(*self.saved))
        self.options_of = itemgetter(*places("scaling", "threshold", "backend"))
        self.differentiable_of = itemgetter(*(i for i in (*self.leaves, self.base) if i < self.count))
        self.function, self.saving = self._function(), self._saving()
        torch.library.register_autograd(
            packet._qualified_op_name, self.backward, setup_context=self.setup_context, lib=ops.LIBRARY
        )

    def dispatched(self, args: tuple) -> Tensor:
        """y, by the dispatcher."""
        region = None if torch.compiler.is_compiling() else checkpointing.HERE.region
        if region is None or not self.is_differentiated(args):
            return self.packet(*args)[0]
        return region.call(self, self.packet, args)[0]

    def differentiated(self, args: tuple) -> Tensor:
        """y of arguments that need gradients, without the dispatcher."""
        region = checkpointing.HERE.region
        return (self.function.apply(*args) if region is None else region.call(self, self.function.apply, args))[0]

    def is_differentiated(self, args: tuple) -> bool:
        """Will gradients of this call be asked for?"""
        if torch.is_grad_enabled():
            for tensor in self.differentiable_of(args):
                if tensor is not None and tensor.requires_grad:
                    return True
        return False

    def shape_of_p(self, args: tuple) -> tuple[int, int]:
        """(M, R)."""
        x, lora_a, _, dash_sigma, _ = self.leaves_of((*args, None))
        return x.shape[0], lora_a.shape[0] + (0 if dash_sigma is None else dash_sigma.shape[0])

    def with_seed(self, args: tuple, seed: Tensor | None) -> tuple:
        """The arguments with this seed."""
        return (*args[: self.seed], seed, *args[self.seed + 1 :])

    def setup_context(self, ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
        """Saves what backward needs. Raises ValueError where a gradient is wanted that no kernel computes."""
        self._save(ctx, inputs, output[1])
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)

    def _save(self, ctx: Any, inputs: tuple, p: Tensor) -> None:
        needs, inputs = ctx.needs_input_grad, (*inputs, None)
        for name, place in self.frozen:
            if needs[place]:
                raise ValueError(
                    f"{name} requires grad, and is frozen in a LoRA-Dash layer: {name}.requires_grad_(False)"
                )
        ctx.save_for_backward(*self.saved_of(inputs), p, inputs[self.seed])
        ctx.options = self.options_of(inputs)
        bias = inputs[self.bias]
        ctx.bias_dtype = None if bias is None else bias.dtype

    def backward(self, ctx: Any, dy: Tensor | None, dp: Tensor | None) -> tuple[Tensor | None, ...]:
        """A gradient for every argument, in the dtype of that argument, None where there is none or none is needed."""
        found: list[Tensor | None] = [None] * (self.count + 1)
        if dy is None:
            return tuple(found[:-1])
        *tensors, seed = ctx.saved_tensors
        x, _, lora_a, lora_b, _, _, dash_sigma, *_ = tensors
        scaling, threshold, backend = ctx.options
        needed = (*ctx.needs_input_grad, False)
        needs = list(self.leaves_of(needed))
        # Called directly where forward was and dy is plain, through the dispatcher where something must see it.
        run = self.backward_packet if must_dispatch(getattr(ctx, "direct", False), dy, x) else self.run_backward
        grads = run(dy, *tensors, seed, scaling, threshold, needs, backend)
        sigma_dtype = None if dash_sigma is None else dash_sigma.dtype
        dtypes = (x.dtype, lora_a.dtype, lora_b.dtype, sigma_dtype, ctx.bias_dtype)
        for place, grad, dtype, need in zip(self.leaves, grads, dtypes, needs, strict=True):
            if need:
                found[place] = grad if grad.dtype == dtype else grad.to(dtype)
        if needed[self.base]:
            found[self.base] = dy
        return tuple(found[:-1])

    def _function(self) -> Any:
        def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor]:
            # The separate setup_context of torch.autograd.Function would bind the signature in every call, 40 us.
            output = self.run(*args)
            self.setup_context(ctx, args, output)
            ctx.direct = True
            return output

        # Compiled autograd traces no bound method, so backward is a function.
        def backward(ctx: Any, dy: Tensor | None, dp: Tensor | None) -> tuple[Tensor | None, ...]:
            return self.backward(ctx, dy, dp)

        return self._class("Function", forward, backward)

    def _saving(self) -> Any:
        """A function of the arguments and of their P that saves what `function` does, and computes nothing."""

        def forward(ctx: Any, *args: Any) -> Tensor:
            *inputs, p = args
            self._save(ctx, tuple(inputs), p)
            return p.new_empty(())

        def backward(ctx: Any, *grads: Tensor) -> Any:
            raise RuntimeError("loradash: gradients of a recomputation")

        return self._class("Saving", forward, backward)

    def _class(self, suffix: str, forward: Callable[..., Any], backward: Callable[..., Any]) -> Any:
        members = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
        name = "".join(part.title() for part in self.run.__name__.split("_"))
        return type(f"{name}{suffix}", (torch.autograd.Function,), members)


DASH_LINEAR = Operator(torch.ops.loradash.dash_linear, ops.dash_linear)
LOW_RANK_UPDATE = Operator(torch.ops.loradash.low_rank_update, ops.low_rank_update)


def no_second_derivative(ctx: Any, *grads: Tensor) -> tuple[None, ...]:
    """The gradients of a backward operator: RuntimeError."""
    raise RuntimeError(TWICE)


for _name in ("dash_linear_backward", "dash_linear_group_backward"):
    torch.library.register_autograd(f"loradash::{_name}", no_second_derivative, lib=ops.LIBRARY)
