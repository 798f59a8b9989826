"""Mixed batches: one base product for all rows, and for every row the low-rank terms of its own adapter.

Rows are brought together by adapter, once for a batch and all its layers (`group_rows`). Then every group is one call of the
fused operator for its low-rank terms, each with its own gradients. Letters: B rows, K in_features, N out_features, R = r + s.

FLOPs: 2 N K a token for the base product, and 2 (N + K) R of the token's own adapter: those of a plain layer, however many
adapters there are. Bytes: the weight once (on a CPU with many tokens once a group, and y once less), A, B, U, V of the adapters
that have rows once each; where rows are not in order, x is read and written once more, and y twice.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from . import arguments
from .functional import dash_linear, low_rank_update
from .sharded import refuse_distributed

NO_ADAPTER = -1
"""In an index of rows: this row gets the base layer's output alone."""


# From so many tokens an adapter on, on a CPU, the base product of a group is taken together with its terms: W stays in cache for
# that many, and y is written once. With fewer, W is read once for all groups.
_MANY_TOKENS = 64


class Adapter(NamedTuple):
    """What one adapter adds to a layer: the arguments of `dash_linear` of these names."""

    lora_a: Tensor  # (r, K)
    lora_b: Tensor  # (N, r)
    dash_u: Tensor | None = None  # (N, s)
    dash_vt: Tensor | None = None  # (s, K)
    dash_sigma: Tensor | None = None  # (s,)
    scaling: float = 1.0
    dropout_p: float = 0.0


class RowGroups(NamedTuple):
    """The rows of a batch, by adapter.

    Attributes:
        total: how many rows.
        numbers: the adapter of every group, ascending; NO_ADAPTER comes first.
        sizes: rows of every group.
        order: (total,) int64, the rows group after group; None where they stand so.
        inverse: (total,) int64, where each row stands in `order`.
    """

    total: int
    numbers: tuple[int, ...]
    sizes: tuple[int, ...]
    order: Tensor | None
    inverse: Tensor | None


def group_rows(index: Sequence[int] | Tensor, device: torch.device | str | None = None) -> RowGroups:
    """Sorts the rows of a batch by adapter; rows of one adapter keep their order.

    Args:
        index: for every row the number of its adapter, or NO_ADAPTER. A tensor is read back from its device, once.
        device: of the tensors that are to be grouped.

    Raises ValueError for an empty index, one that is not one-dimensional, and for numbers below NO_ADAPTER.
    """
    numbers = index.tolist() if isinstance(index, Tensor) else list(index)
    wrong = [n for n in numbers if isinstance(n, bool) or not isinstance(n, int) or n < NO_ADAPTER]
    if not numbers or wrong:
        raise ValueError(
            f"index must be one integer for each row, an adapter's number or {NO_ADAPTER} for none, got {index!r}"
        )
    order = sorted(range(len(numbers)), key=numbers.__getitem__)
    present = sorted(set(numbers))
    sizes = tuple(numbers.count(n) for n in present)
    if order == list(range(len(numbers))):
        return RowGroups(len(numbers), tuple(present), sizes, None, None)
    sorted_rows = torch.tensor(order, device=device)
    return RowGroups(len(numbers), tuple(present), sizes, sorted_rows, torch.argsort(sorted_rows))


def dash_linear_rows(
    x: Tensor,  # (B, ..., K)
    weight: Tensor,  # (N, K)
    bias: Tensor | None = None,  # (N,)
    *,
    adapters: Sequence[Adapter | None],
    rows: RowGroups,
    training: bool = True,
    backend: str | None = None,
) -> Tensor:  # (B, ..., N)
    """`dash_linear` with an adapter for each row: row i of x has the terms of adapter index[i].

    The results of a row are those of `dash_linear` with its adapter, to rounding. Dropout draws a mask for every group, so a
    row's mask is another than in a batch of one adapter, of the same distribution.

    Args:
        x: its first dimension is that of the rows; a row may be a sequence.
        adapters: by number; None adds nothing, as for a layer that an adapter leaves out.
        rows: `group_rows(index, x.device)`, made once for all layers.

    Raises ValueError where x has another number of rows, for a number without an adapter, for DTensors, and as `dash_linear`.
    """
    _check(adapters, rows, x=x, weight=weight)
    only = rows.numbers[0]
    if len(rows.numbers) == 1 and only != NO_ADAPTER and adapters[only] is not None:
        return dash_linear(x, weight, bias, **adapters[only]._asdict(), training=training, backend=backend)  # type: ignore[union-attr]
    dtype = arguments.autocast_dtype(x)
    if dtype is not None:
        x, weight, bias = arguments.autocast_base(x, weight, bias, dtype)
    arguments.check_base(x, weight, bias)
    tokens = x.shape[:-1].numel()
    if x.is_cpu and tokens >= _MANY_TOKENS * len(rows.numbers):

        def whole(adapter: Adapter | None, part: Tensor) -> Tensor:
            if adapter is None:
                return _base(part, weight, bias)
            return dash_linear(part, weight, bias, **adapter._asdict(), training=training, backend=backend)

        return _by_group(whole, adapters, rows, x)
    y = _base(x, weight, bias) if backend is None else F.linear(x, weight, bias)
    return low_rank_update_rows(y, x, adapters=adapters, rows=rows, training=training, backend=backend)


def _base(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x Wᵀ + b. On a CPU by the fused operator with an adapter of rank 0: its kernels keep frozen weights packed, which takes
    about half the library's time."""
    if not x.is_cpu:
        return F.linear(x, weight, bias)
    n, k = weight.shape
    return dash_linear(x, weight, bias, lora_a=x.new_empty(0, k), lora_b=x.new_empty(n, 0))


def low_rank_update_rows(
    y: Tensor,  # (B, ..., N)
    x: Tensor,  # (B, ..., K)
    *,
    adapters: Sequence[Adapter | None],
    rows: RowGroups,
    training: bool = True,
    backend: str | None = None,
) -> Tensor:  # (B, ..., N)
    """y plus every row's own low-rank terms, for a base layer of any kind. Arguments and errors as `dash_linear_rows`."""
    _check(adapters, rows, x=x, y=y)
    if y.shape[:-1] != x.shape[:-1]:
        raise ValueError(
            f"y has shape {tuple(y.shape)}, x {tuple(x.shape)}; they must agree but for the last dimension"
        )
    if all(n == NO_ADAPTER or adapters[n] is None for n in rows.numbers):
        return y

    def terms(adapter: Adapter | None, part: Tensor, base: Tensor) -> Tensor:
        if adapter is None:
            return base
        return low_rank_update(base, part, **adapter._asdict(), training=training, backend=backend)

    return _by_group(terms, adapters, rows, x, y)


def _by_group(
    compute: Callable[..., Tensor], adapters: Sequence[Adapter | None], rows: RowGroups, *tensors: Tensor
) -> Tensor:
    """compute(adapter or None, the group's part of each tensor) for every group, put together in the order of the rows."""
    if rows.order is not None:
        # One permutation and views of it: a selection for each group would fill a gradient of the whole tensor for each.
        tensors = tuple(t.index_select(0, rows.order) for t in tensors)
    chosen = [None if n == NO_ADAPTER else adapters[n] for n in rows.numbers]
    parts = map(compute, chosen, *(t.split(rows.sizes) for t in tensors))
    out = torch.cat(list(parts)) if len(chosen) > 1 else next(parts)
    return out if rows.inverse is None else out.index_select(0, rows.inverse)


def _check(adapters: Sequence[Adapter | None], rows: RowGroups, **tensors: Tensor) -> None:
    x = tensors["x"]
    refuse_distributed("a mixed batch", tensors)
    if x.dim() < 2 or x.shape[0] != rows.total:
        raise ValueError(
            f"x has shape {tuple(x.shape)}; wanted ({rows.total}, ..., K), as the mixed batch has an adapter for each of "
            f"{rows.total} rows, which are the first dimension"
        )
    if rows.numbers[-1] >= len(adapters):
        raise ValueError(f"the index of rows has adapter {rows.numbers[-1]}, and there are {len(adapters)}")
