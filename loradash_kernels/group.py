"""Several layers that read the same x in one operator: the projections of attention, the two of a gated block."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from . import arguments, composite
from .functional import _rows, _threshold
from .group_autograd import GROUP, LISTS
from .random import draw_seed
from .sharded import refuse_distributed

_PLAIN = frozenset({Tensor, torch.nn.Parameter, torch.nn.parameter.Buffer})


@dataclass(frozen=True, kw_only=True, eq=False)
class GroupMember:
    """The tensors of one layer of a group, as `dash_linear` takes them; N, r and s may differ from member to member."""

    weight: Tensor  # (N, K)
    bias: Tensor | None = None  # (N,)
    lora_a: Tensor  # (r, K)
    lora_b: Tensor  # (N, r)
    dash_u: Tensor | None = None  # (N, s)
    dash_vt: Tensor | None = None  # (s, K)
    dash_sigma: Tensor | None = None  # (s,)
    scaling: float = 1.0

    @property
    def adapters(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
        """lora_a, lora_b, dash_u, dash_vt, dash_sigma."""
        return self.lora_a, self.lora_b, self.dash_u, self.dash_vt, self.dash_sigma


def dash_linear_group(
    x: Tensor,  # (..., K)
    members: Sequence[GroupMember],
    *,
    dropout_p: float = 0.0,
    training: bool = True,
    backend: str | None = None,
) -> list[Tensor]:  # (..., N_i) each
    """`dash_linear` of every member for one x, in one operator and with one mask of dropout for all.

    y_i = x W_iᵀ + b_i + scaling_i · x̃ A_iᵀ B_iᵀ + Σ_j Δσ_ij (x̃ · v_ij) u_ijᵀ, with x̃ = dropout(x), the same for every i.

    The FLOPs are those of separate layers. On the CPU x is read once for all the down-projections, which are one product,
    and staged once for all the base products; backward reads every dy once, x once for all dA, and writes dx once, where
    autograd would add those of separate layers: 2 (g - 1) reads and g - 1 writes of (M, K) less, and g - 1 masks drawn less
    in each pass. Plain PyTorch on a GPU drops x once, with one product for all D and one for all dA. The CUDA and Triton
    kernels take the members one after another with the same mask, and their dx are added (`explain_backend`, members=).

    Args:
        x: as in `dash_linear`.
        members: one or more. Frozen and trainable tensors are those of `dash_linear`.
        dropout_p, training, backend: as in `dash_linear`, for all members.

    Errors are those of `dash_linear`, and name the member by its place. A ValueError for no member.
    """
    members = list(members)
    if not members:
        raise ValueError("members is empty; wanted one layer or more")
    dtype = arguments.autocast_dtype(x)
    if dtype is not None:
        device = x.device
        x = arguments.autocast(x, dtype, device)
        members = [_cast(member, dtype, device) for member in members]
    for i, member in enumerate(members):
        try:
            arguments.check_adapters(x, member.weight.shape, *member.adapters)
            arguments.check_base(x, member.weight, member.bias)
        except ValueError as error:
            raise ValueError(f"member {i}: {error}") from error
    threshold = _threshold(dropout_p, training)
    if composite.is_wanted():
        composite.refuse(threshold, backend)
        return [composite.dash_linear(x, m.weight, m.bias, *m.adapters, m.scaling) for m in members]
    seed = draw_seed(x.device) if threshold else None
    lists = [[_present(member, name) for member in members] for name in LISTS]
    options = (seed, [float(member.scaling) for member in members], threshold, backend)
    outputs = _call(_rows(x), lists, options)
    return outputs if x.dim() == 2 else [y.view(*x.shape[:-1], y.shape[1]) for y in outputs]


def _cast(member: GroupMember, dtype: torch.dtype, device: torch.device) -> GroupMember:
    """A member as autocast takes it: weight and bias in its dtype."""
    weight, bias = arguments.autocast(member.weight, dtype, device), member.bias
    bias = None if bias is None else arguments.autocast(bias, dtype, device)
    return GroupMember(**{**vars(member), "weight": weight, "bias": bias})


def _present(member: GroupMember, name: str) -> Tensor:
    """A tensor of a member; an empty one where it has none: lists of an operator have no gaps."""
    tensor = getattr(member, name)
    if tensor is not None:
        return tensor
    n, k = member.weight.shape
    like = member.weight if name == "bias" else member.lora_a
    return like.new_empty({"bias": (0,), "dash_u": (n, 0), "dash_vt": (0, k), "dash_sigma": (0,)}[name])


def _call(x: Tensor, lists: list[list[Tensor]], options: tuple) -> list[Tensor]:
    """As `functional` calls an operator: by the dispatcher where something looks at operations."""
    tensors = (x, *(t for members in lists for t in members))
    plain = _PLAIN.issuperset(map(type, tensors))
    if not plain:
        named = {f"{name} of member {i}": t for name, of in zip(LISTS, lists, strict=True) for i, t in enumerate(of)}
        refuse_distributed("a group", {"x": x, **named})
    dispatch = bool(
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._is_tracing()
        or not plain
        or x.is_meta
    )
    return GROUP.call(dispatch, (*tensors, *options))
