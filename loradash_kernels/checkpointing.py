"""Activation checkpoints that keep P, so that the last layer of a region is not computed twice.

What backward needs of a layer is x and P (M, R), and only the layer itself computes P: recomputing a region up to its last
tensor that backward needs therefore runs that layer whole, base product and all, where a frozen nn.Linear would be left out
(nothing of its output is needed). P is small, 4·M·R bytes: kept from the forward pass, it lets the recomputation end before
the layer does.

Eager: recomputation lays down what a layer saves before it computes y, and PyTorch stops there when nothing is missing any
more. Compiled: P is marked to be saved and everything else to be recomputed, so the partitioner drops a y that nobody uses.
"""

from __future__ import annotations

import threading
from abc import abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

# The outputs of one layer or of a group, and behind them P.
Call = Callable[..., tuple[Tensor, ...]]


class _Here(threading.local):
    """The region that this thread is inside, if any: backward may run in a thread of its own."""

    region: Region | None = None


HERE = _Here()


class Region(AbstractContextManager["Region"]):
    """One pass over a checkpointed region; `kept` are P and seed of its layers in the order of their calls."""

    def __init__(self, kept: list[tuple[Tensor, Tensor | None]]) -> None:
        self.kept = kept
        self._outer: list[Region | None] = []

    def __enter__(self) -> Region:
        self._outer.append(HERE.region)
        HERE.region = self
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        HERE.region = self._outer.pop()

    @abstractmethod
    def call(self, operator: Any, call: Call, args: tuple) -> tuple[Tensor, ...]:
        """y and P of a layer whose arguments need gradients, by `call` or otherwise; every y, and P, of a group.

        operator: an `autograd.Operator`, or the `group_autograd.Group`."""


class _Forward(Region):
    def call(self, operator: Any, call: Call, args: tuple) -> tuple[Tensor, ...]:
        found = call(*args)
        self.kept.append((found[-1].detach(), operator.seed_of(args)))
        return found


class _Recomputation(Region):
    def __enter__(self) -> Region:
        # A graph that is retained is recomputed once more.
        self._next = iter(self.kept)
        return super().__enter__()

    def call(self, operator: Any, call: Call, args: tuple) -> tuple[Tensor, ...]:
        p, seed = next(self._next, (None, None))
        wanted = operator.shape_of_p(args)
        if p is None or p.shape != wanted:
            found = "none is left" if p is None else f"the one kept is {tuple(p.shape)}"
            raise RuntimeError(
                f"loradash: keep_projections has no P {wanted} for a layer, {found}: the checkpointed function called other "
                "layers in its recomputation than in its forward pass"
            )
        # P was made with this seed, whatever the generator gave now.
        args = operator.with_seed(args, seed)
        saved = operator.saving.apply(*args, p)
        with torch.no_grad():
            *outputs, _ = operator.packet(*args)
        return (*_Attached.apply(saved, *outputs), p)


class _Attached(torch.autograd.Function):
    """Outputs as what needs gradients. They are never asked for: recomputation is there for what it saves."""

    @staticmethod
    def forward(ctx: Any, saved: Tensor, *outputs: Tensor) -> tuple[Tensor, ...]:
        return tuple(y.view_as(y) for y in outputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise RuntimeError("loradash: gradients of a recomputation")


def keep_projections() -> tuple[AbstractContextManager, AbstractContextManager]:
    """The `context_fn` of torch.utils.checkpoint (with use_reentrant=False) that keeps P and recomputes the rest.

    P is 4·M·(r + s) bytes a layer, and its seed 16. The gradients are those without it, and so are the masks. Where a region ends
    with an adapted layer, as the blocks of transformers do, that layer's 2·M·N·K FLOPs are not spent again.
    Under torch.compile the region may hold no in-place operations, as PyTorch says of every context_fn.
    """
    if torch.compiler.is_compiling() or torch._guards.TracingContext.try_get() is not None:
        return _traced()
    kept: list[tuple[Tensor, Tensor | None]] = []
    return _Forward(kept), _Recomputation(kept)


def _policy(context: Any, op: Any, *args: Any, **kwargs: Any) -> Any:
    from torch.utils.checkpoint import CheckpointPolicy

    kept = op is torch.ops.loradash.project.default
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


class _Splitting(TorchDispatchMode):
    """Shows a policy every layer in two steps: its P, and the rest.

    The partitioner saves an operator's results whole, and only what the outputs of the forward pass hang upon: so P is a result
    of its own, and y is computed from it.
    """

    def __init__(self, policy: Any) -> None:
        super().__init__()
        self._policy = policy

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True

    @property
    def ac_graph_id(self) -> Any:
        return self._policy.ac_graph_id

    @ac_graph_id.setter
    def ac_graph_id(self, number: Any) -> None:
        """The compiler names the region by it."""
        self._policy.ac_graph_id = number

    def __enter__(self) -> _Splitting:
        self._policy.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._policy.__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        ops = torch.ops.loradash
        if func is ops.dash_linear.default:
            x, _, _, *rest = args
            p = ops.project(x, *rest)
            return ops.dash_linear_after(p, *args), p
        if func is ops.low_rank_update.default:
            p = ops.project(*args[1:])
            return ops.low_rank_update_after(p, *args), p
        return func(*args, **(kwargs or {}))


def _traced() -> tuple[AbstractContextManager, AbstractContextManager]:
    from torch.utils.checkpoint import create_selective_checkpoint_contexts

    forward, recomputation = create_selective_checkpoint_contexts(_policy)
    return _Splitting(forward), _Splitting(recomputation)
