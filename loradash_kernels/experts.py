"""Experts: one LoRA-Dash layer for each of E weights, over rows that are sorted by their expert.

The layers of a mixture of experts are one parameter (E, N, K), and expert e multiplies the M_e rows that the router sent it,
none for some. One operator computes all of them, so that there is one node of autograd whatever E is, and the gradients of
the stacked adapters (E, r, K), (E, N, r) and (E, s) are written slice by slice, zeros where no row came.

FLOPs: forward 2 M (N K + (K + N) R), backward the same again and 2 M r (K + N) for dA and dB, with M = Σ M_e and
R = r + s: those of one layer with M rows, and 2 M K N more where dx is wanted. Bytes: x, y and, of the experts that were
hit, W and the adapters, once a pass. Peers add ΔW to all experts' weights instead: 2 E N K r FLOPs and 2 E N K numbers
written and read a pass, whatever M is, and E N K numbers of gradient of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from . import arguments, composite, functional, ops
from .autograd import Operator, no_second_derivative
from .backends import registry
from .calls import BackwardCall, ForwardCall, accumulator
from .random import check_seed, draw_seed, row_windows
from .sharded import refuse_distributed

_SCHEMA_ADAPTERS = "Tensor lora_a, Tensor lora_b, Tensor? dash_u, Tensor? dash_vt, Tensor? dash_sigma"
_SCHEMA_OPTIONS = "Tensor? seed, float scaling, int threshold"

ops.LIBRARY.define(
    f"dash_experts(Tensor x, Tensor weight, Tensor offsets, Tensor? bias, {_SCHEMA_ADAPTERS}, {_SCHEMA_OPTIONS}, "
    "str? backend) -> (Tensor y, Tensor p)"
)
ops.LIBRARY.define(
    f"dash_experts_backward(Tensor dy, Tensor x, Tensor weight, {_SCHEMA_ADAPTERS}, Tensor offsets, Tensor p, "
    f"{_SCHEMA_OPTIONS}, bool[] needs, str? backend) -> (Tensor dx, Tensor da, Tensor db_lora, Tensor dsigma, Tensor dbias)"
)


def dash_experts(
    x: Tensor,  # (M, K), sorted by expert
    weight: Tensor,  # (E, N, K)
    offsets: Tensor,  # (E,) int32 or int64
    bias: Tensor | None = None,  # (E, N)
    *,
    lora_a: Tensor,  # (E, r, K)
    lora_b: Tensor,  # (E, N, r)
    dash_u: Tensor | None = None,  # (E, N, s)
    dash_vt: Tensor | None = None,  # (E, s, K)
    dash_sigma: Tensor | None = None,  # (E, s)
    scaling: float = 1.0,
    dropout_p: float = 0.0,
    training: bool = True,
    backend: str | None = None,
) -> Tensor:  # (M, N)
    """`dash_linear` of every expert on its own rows, in one operator.

    Args:
        x: rows of expert 0, then of expert 1, and so on; no rows at all are allowed.
        weight: frozen, in the dtype of x; a transposed view of (E, K, N) is taken as it is.
        offsets: behind the last row of each expert: the cumulative sums of the M_e, as `torch._grouped_mm` takes them. The
            last is M.
        bias, lora_a, ..., backend: as in `dash_linear`, with a leading dimension of E. One dropout mask is drawn for (M, K).

    Experts are computed one after the other by the kernels of `dash_linear`, for which the M_e must be known to the host: on
    a GPU a call waits for `offsets`. It traces without a graph break.

    Raises:
        ValueError: as `dash_linear`, and for offsets that do not ascend from 0 to M.
        RuntimeError: a requested backend that cannot run; torch.func transforms and forward-mode differentiation;
            differentiating the gradients again.
    """
    dtype = arguments.autocast_dtype(x)
    if dtype is not None:
        x, weight, bias = arguments.autocast_base(x, weight, bias, dtype)
    adapters = (lora_a, lora_b, dash_u, dash_vt, dash_sigma)
    _check(x, weight, offsets, bias, adapters)
    threshold = functional._threshold(dropout_p, training)
    if composite.is_wanted():
        raise RuntimeError("loradash: dash_experts knows no torch.func transforms and no forward-mode differentiation")
    seed = draw_seed(x.device) if threshold else None
    return functional._call(EXPERTS, (x, weight, offsets, bias, *adapters, seed, float(scaling), threshold, backend))


def expert_offsets(index: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """How rows are sorted by their expert: (order (M,), offsets (E,)), both int64.

    `x[order]` is what `dash_experts` takes, and y of it goes back by `torch.empty_like(y).index_copy(0, order, y)`. Rows of
    one expert keep their order.

    Args:
        index: (M,) the expert of each row, in [0, experts).
    """
    sorted_index, order = torch.sort(index, stable=True)
    ends = torch.arange(1, experts + 1, device=index.device, dtype=sorted_index.dtype)
    return order, torch.searchsorted(sorted_index, ends)


def _check(x: Tensor, weight: Tensor, offsets: Tensor, bias: Tensor | None, adapters: Sequence[Tensor | None]) -> None:
    """Checks everything but the values of offsets, which the host may not know."""
    names = ("weight", "bias", "lora_a", "lora_b", "dash_u", "dash_vt", "dash_sigma")
    stacked = dict(zip(names, (weight, bias, *adapters), strict=True))
    refuse_distributed("experts", {"x": x, **stacked})
    if weight.dim() != 3 or weight.shape[0] == 0:
        raise ValueError(f"weight has shape {tuple(weight.shape)}; wanted (E, N, K) with at least one expert")
    experts = weight.shape[0]
    for name, t in stacked.items():
        wanted = 2 if name in ("bias", "dash_sigma") else 3
        if t is not None and (t.dim() != wanted or t.shape[0] != experts):
            raise ValueError(
                f"{name} has shape {tuple(t.shape)}; wanted {wanted} dimensions, the first of {experts} experts"
            )
    if x.dim() != 2:
        raise ValueError(f"x has shape {tuple(x.shape)}; wanted (M, K), rows sorted by expert")
    if offsets.shape != (experts,) or offsets.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"offsets has shape {tuple(offsets.shape)} and dtype {offsets.dtype}; wanted ({experts},) of int32 or int64"
        )
    if offsets.device != x.device:
        raise ValueError(f"offsets is on {offsets.device}, x is on {x.device}; they must be on one device")
    frozen = [n for n in ("weight", "dash_u", "dash_vt") if (t := stacked[n]) is not None and t.requires_grad]
    if frozen:
        raise ValueError(
            f"{frozen[0]} requires grad, and is frozen in a LoRA-Dash layer: {frozen[0]}.requires_grad_(False)"
        )
    with torch.no_grad():
        one = [None if t is None else t[0] for t in stacked.values()]
    arguments.check_adapters(x, one[0].shape, *one[2:])  # type: ignore[union-attr, arg-type]
    arguments.check_base(x, one[0], one[1])  # type: ignore[arg-type]


def _spans(offsets: Tensor, m: int) -> list[int]:
    """The M_e. Raises ValueError for offsets that do not ascend to m."""
    ends = offsets.tolist()
    counts = [end - start for start, end in zip([0, *ends[:-1]], ends, strict=True)]
    if ends[-1] != m or min(counts) < 0:
        raise ValueError(f"offsets must ascend to the {m} rows of x, the cumulative sums of rows an expert; got {ends}")
    return counts


def _hit(
    offsets: Tensor, seed: Tensor | None, threshold: int, m: int
) -> tuple[list[int], list[tuple[int, Tensor | None]]]:
    """The M_e, and of every expert with rows its number and the seed of its part of the mask."""
    counts = _spans(offsets, m)
    starts = {e: end - count for e, (end, count) in enumerate(zip(accumulate(counts), counts, strict=True)) if count}
    none: list[Tensor | None] = [None] * len(starts)
    masks = none if seed is None or not threshold else row_windows(seed, list(starts.values()))
    return counts, list(zip(starts, masks, strict=True))


def _each(t: Tensor | None) -> Any:
    """The slices of a stacked tensor, by expert."""
    return _Nothing() if t is None else t.unbind(0)


class _Nothing:
    """None for every expert."""

    def __getitem__(self, expert: int) -> None:
        return None


def _rows(t: Tensor | None, counts: list[int]) -> Any:
    """The rows of every expert."""
    return _Nothing() if t is None else t.split(counts)


def _allocate(x: Tensor, weight: Tensor, lora_a: Tensor, dash_sigma: Tensor | None) -> tuple[Tensor, Tensor]:
    """y (M, N) in the dtype of x, P (M, R) in the accumulator's."""
    width = lora_a.shape[1] + (0 if dash_sigma is None else dash_sigma.shape[1])
    return x.new_empty(x.shape[0], weight.shape[1]), x.new_empty(x.shape[0], width, dtype=accumulator(x.dtype))


def _allocate_gradients(
    needs: list[bool], x: Tensor, lora_a: Tensor, lora_b: Tensor, dash_sigma: Tensor | None
) -> ops.Gradients:
    """dx, da, db_lora, dsigma, dbias, zero but for dx; those not needed are empty (0,), in the dtype of x."""
    wide, (dx, da, db_lora, dsigma, dbias) = accumulator(x.dtype), needs
    sigma_shape = (lora_a.shape[0], 0) if dash_sigma is None else dash_sigma.shape
    return (
        x.new_empty(*x.shape) if dx else x.new_empty(0),
        x.new_zeros(*lora_a.shape, dtype=wide) if da else x.new_empty(0),
        x.new_zeros(*lora_b.shape, dtype=wide) if db_lora else x.new_empty(0),
        x.new_zeros(*sigma_shape, dtype=wide) if dsigma else x.new_empty(0),
        x.new_zeros(*lora_b.shape[:2], dtype=wide) if dbias else x.new_empty(0),
    )


def _dash_experts(
    x: Tensor,
    weight: Tensor,
    offsets: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    dash_u: Tensor | None,
    dash_vt: Tensor | None,
    dash_sigma: Tensor | None,
    seed: Tensor | None,
    scaling: float,
    threshold: int,
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    """y and P of all experts, each by the kernels of its own call."""
    check_seed(seed, x)
    y, p = _allocate(x, weight, lora_a, dash_sigma)
    counts, hit = _hit(offsets, seed, threshold, x.shape[0])
    xs, ys, ps = (_rows(t, counts) for t in (x, y, p))
    parts = [_each(t) for t in (weight, bias, lora_a, lora_b, dash_u, dash_vt, dash_sigma)]
    for e, mask in hit:
        tensors = (xs[e], *(part[e] for part in parts), mask)
        call = ForwardCall(*tensors, scaling, threshold, None, ys[e], ps[e])  # type: ignore[call-arg]
        registry.pick(call, backend).forward(call)
    return y, p


def _dash_experts_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    dash_u: Tensor | None,
    dash_vt: Tensor | None,
    dash_sigma: Tensor | None,
    offsets: Tensor,
    p: Tensor,
    seed: Tensor | None,
    scaling: float,
    threshold: int,
    needs: list[bool],
    backend: str | None,
) -> ops.Gradients:
    """The gradients of all experts, each written into its slice."""
    check_seed(seed, x)
    grads = _allocate_gradients(needs, x, lora_a, lora_b, dash_sigma)
    counts, hit = _hit(offsets, seed, threshold, x.shape[0])
    wanted = [g if need else None for g, need in zip(grads, needs, strict=True)]
    dys, xs, ps, dxs = (_rows(t, counts) for t in (dy, x, p, wanted[0]))
    parts = [_each(t) for t in (weight, lora_a, lora_b, dash_u, dash_vt, dash_sigma)]
    slices = [_each(t) for t in wanted[1:]]
    for e, mask in hit:
        tensors = (dys[e], xs[e], *(part[e] for part in parts), ps[e], mask)
        call = BackwardCall(*tensors, scaling, threshold, dxs[e], *(part[e] for part in slices))  # type: ignore[call-arg]
        registry.pick(call, backend).backward(call)
    return grads


def _fake_forward(*arguments_: Any) -> tuple[Tensor, Tensor]:
    check_seed(arguments_[9], arguments_[0])
    return _allocate(arguments_[0], arguments_[1], arguments_[4], arguments_[8])


def _fake_backward(*arguments_: Any) -> ops.Gradients:
    check_seed(arguments_[10], arguments_[1])
    return _allocate_gradients(arguments_[-2], arguments_[1], arguments_[3], arguments_[4], arguments_[7])


for _name, _real, _fake in (
    ("dash_experts", _dash_experts, _fake_forward),
    ("dash_experts_backward", _dash_experts_backward, _fake_backward),
):
    ops.LIBRARY.impl(_name, _real, "CompositeExplicitAutograd")
    torch.library.register_fake(f"loradash::{_name}", _fake, lib=ops.LIBRARY)


class _Experts(Operator):
    """The gradients are those of a linear layer, and backward needs the offsets too."""

    saved = (*Operator.saved, "offsets")
    backward_packet = torch.ops.loradash.dash_experts_backward
    run_backward = staticmethod(_dash_experts_backward)

    def shape_of_p(self, args: tuple) -> tuple[int, int]:
        x, lora_a, _, dash_sigma, _ = self.leaves_of((*args, None))
        return x.shape[0], lora_a.shape[1] + (0 if dash_sigma is None else dash_sigma.shape[1])


EXPERTS = _Experts(torch.ops.loradash.dash_experts, _dash_experts)
torch.library.register_autograd("loradash::dash_experts_backward", no_second_derivative, lib=ops.LIBRARY)
