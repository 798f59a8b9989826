"""What activation checkpoints of a model's blocks keep between the passes, and what they compute again."""

from __future__ import annotations

import gc
import itertools
from collections.abc import Callable
from typing import Any

import torch
from loradash import DashConfig, apply_dash
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import create_selective_checkpoint_contexts
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.front_ends.models import TARGETS, VOCABULARY, Sizes, make_model
from loradash_kernels import keep_projections

SIZES = Sizes(256, 688, layers=4, batch=2, tokens=256)


def _keep_products() -> Any:
    """Every adapted layer's y and P are kept, as one keeps the results of products of matrices."""
    return create_selective_checkpoint_contexts([torch.ops.loradash.dash_linear.default])


WAYS: dict[str, dict[str, Any] | None] = {
    "nothing checkpointed": None,
    "blocks checkpointed": {},
    "blocks, keep_projections": {"context_fn": keep_projections},
    "blocks, a policy that keeps y and P": {"context_fn": _keep_products},
}


class Alive(TorchDispatchMode):
    """Watches the storages of all results but those of the model itself, of which views are taken."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        own = itertools.chain(model.parameters(), model.buffers())
        self._own = {tensor.untyped_storage()._cdata for tensor in own}
        self._seen: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                storage = leaf.untyped_storage()
                if storage._cdata in self._own:
                    continue
                self._seen[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        return out

    def bytes(self) -> int:
        """Those that are still there."""
        gc.collect()
        return sum(size for reference, size in self._seen.values() if not reference.expired())


def _adapted() -> nn.Module:
    config = DashConfig(r=16, directions=8, dropout=0.05, target_modules=[*TARGETS])
    return apply_dash(make_model(SIZES), config)


def _checkpointed(make: Callable[[], nn.Module], way: dict[str, Any] | None) -> nn.Module:
    model: Any = make()
    # Gradients go back to the vector that is added to the embeddings, so through all blocks.
    model.model.embed_tokens.vector.requires_grad_(True)
    if way is not None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False, **way})
    return model.train()


def _loss(model: Any) -> torch.Tensor:
    torch.manual_seed(3)
    ids = torch.randint(VOCABULARY, (SIZES.batch, SIZES.tokens), generator=torch.Generator().manual_seed(1))
    return model(input_ids=ids, labels=ids).loss


def _measured(model: nn.Module) -> tuple[int, int, list[torch.Tensor]]:
    """Bytes between the passes, FLOPs of a step, and gradients."""
    with Alive(model) as alive:
        loss = _loss(model)
    kept = alive.bytes()
    del loss
    with FlopCounterMode(display=False) as counter:
        _loss(model).backward()
    return kept, counter.get_total_flops(), [p.grad for p in model.parameters() if p.grad is not None]


def rows() -> list[dict[str, Any]]:
    """A row a way. Raises RuntimeError where gradients differ from those without checkpoints."""
    found = []
    cases = [("adapted", _adapted, WAYS), ("frozen", lambda: make_model(SIZES), list(WAYS)[:2])]
    for kind, make, names in cases:
        expected, first = None, None
        for name in names:
            kept, flops, grads = _measured(_checkpointed(make, WAYS[name]))
            expected, first = expected or grads, first or (kept, flops)
            if not all(torch.equal(a, b) for a, b in zip(grads, expected, strict=True)):
                raise RuntimeError(f"{name}: other gradients than without checkpoints")
            row = {"model": kind, "way": name, "kept bytes": kept, "FLOPs": flops}
            found.append({**row, "kept": kept / first[0], "work": flops / first[1]})
    return found
