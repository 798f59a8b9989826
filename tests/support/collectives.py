"""Counts what a process hands to collectives, whoever calls them: DDP's reducer, FSDP, DTensor, torch.distributed itself.

with Traffic() as traffic:
    loss.backward()
traffic.calls["all_gather"], traffic.bytes["all_gather"]
"""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# What an operator of these libraries does, by the first of these words that its name has.
LIBRARIES = ("c10d", "c10d_functional", "_c10d_functional", "_c10d_functional_autograd", "_dtensor")
KINDS = {
    "allgather": "all_gather",
    "allreduce": "all_reduce",
    "reducescatter": "reduce_scatter",
    "alltoall": "all_to_all",
    "broadcast": "broadcast",
    "send": "send",
    "reduce": "reduce",
    "gather": "gather",
    "scatter": "scatter",
}


class Traffic(TorchDispatchMode):
    """Within the block, by kind (all_gather, all_reduce, reduce_scatter, all_to_all, broadcast, ...):

    Attributes:
        calls: how many.
        bytes: of the whole tensor of each: what an all-gather gives, what a reduce-scatter takes. A ring of n processes
            sends (n - 1) / n of that, in an all-reduce twice as much.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # Their collectives are seen once DTensor has taken the operation apart.
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented
        out = func(*args, **(kwargs or {}))
        if func.namespace in LIBRARIES:
            name = func._schema.name.partition("::")[2].replace("_", "")
            kind = next((kind for word, kind in KINDS.items() if word in name), None)
            # Others wait, meet or receive.
            if kind is not None:
                self.calls[kind] += 1
                results = out if isinstance(out, tuple) else (out,)
                self.bytes[kind] += max(map(_bytes, (*args, *results)))
        return out

    @property
    def total(self) -> int:
        """Bytes of all kinds."""
        return sum(self.bytes.values())


def _bytes(values: Any) -> int:
    """What one argument or result takes: a tensor, or a list of them."""
    tensors = [value for value in tree_leaves(values) if isinstance(value, Tensor)]
    return sum(t.numel() * t.element_size() for t in tensors)
