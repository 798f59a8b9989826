"""torch.nn's attention modules multiply by their projections' weights; here they are made to call the adapted layers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_BEFORE = "_loradash_before"
"""The attribute of a parent that holds the flags which `call_adapted_layers` changed."""


class AdaptedMultiheadAttention(nn.MultiheadAttention):
    """nn.MultiheadAttention that calls its `out_proj` instead of multiplying by out_proj.weight.

    torch's function for the attention insists on a last product, which is one by the identity here: E² multiplications
    a token more than nn.MultiheadAttention does. A module becomes one by its class alone: state dict, pickles and
    isinstance checks stay as they were. Arguments, results and errors are those of nn.MultiheadAttention, but for nested
    tensors, which only the fast path of torch takes: ValueError.
    """

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        if query.is_nested or key.is_nested or value.is_nested:
            raise ValueError("nn.MultiheadAttention with adapters takes no nested tensors; pad them")
        batched_first = self.batch_first and query.dim() == 3
        if batched_first:
            query, key, value = (t.transpose(0, 1) for t in (query, key, value))
        separate: dict[str, Any] = {}
        if not self._qkv_same_embed_dim:
            separate = {f"{name}_proj_weight": getattr(self, f"{name}_proj_weight") for name in "qkv"}
            separate["use_separate_proj_weight"] = True
        attended, weights = F.multi_head_attention_forward(
            query,
            key,
            value,
            self.embed_dim,
            self.num_heads,
            self.in_proj_weight,
            self.in_proj_bias,
            self.bias_k,
            self.bias_v,
            self.add_zero_attn,
            self.dropout,
            torch.eye(self.embed_dim, dtype=query.dtype, device=query.device),
            None,
            training=self.training,
            key_padding_mask=_additive(key_padding_mask, attn_mask, "key_padding_mask", "attn_mask", query.dtype),
            need_weights=need_weights,
            attn_mask=_additive(attn_mask, None, "attn_mask", "", query.dtype),
            average_attn_weights=average_attn_weights,
            is_causal=is_causal,
            **separate,
        )
        y = self.out_proj(attended)
        return (y.transpose(0, 1) if batched_first else y), weights


def _additive(
    mask: Tensor | None, other: Tensor | None, name: str, other_name: str, dtype: torch.dtype
) -> Tensor | None:
    """A mask as numbers to add, as nn.MultiheadAttention makes it; bool masks that disagree with the other's type raise."""
    return F._canonical_mask(mask, name, F._none_or_dtype(other), other_name, dtype, check_other=other is not None)


def call_adapted_layers(parent: nn.Module) -> None:
    """Makes one of torch.nn's own modules call those of its children that are adapted, in every mode.

    nn.MultiheadAttention by its class; nn.TransformerEncoderLayer and nn.TransformerEncoder by the flags that decide
    about their fused path for evaluation, which reads all weights and calls no child.
    """
    if type(parent) is nn.MultiheadAttention:
        parent.__class__ = AdaptedMultiheadAttention
    if isinstance(parent, nn.TransformerEncoderLayer):
        _set(parent, activation_relu_or_gelu=0)
    if isinstance(parent, nn.TransformerEncoder):
        _set(parent, use_nested_tensor=False, enable_nested_tensor=False)


def _set(parent: nn.Module, **flags: Any) -> None:
    before = parent.__dict__.setdefault(_BEFORE, {})
    for name, value in flags.items():
        before.setdefault(name, getattr(parent, name))
        setattr(parent, name, value)


def compute_as_before(parent: nn.Module) -> None:
    """Undoes `call_adapted_layers`."""
    if type(parent) is AdaptedMultiheadAttention:
        parent.__class__ = nn.MultiheadAttention  # type: ignore[assignment]
    for name, value in parent.__dict__.pop(_BEFORE, {}).items():
        setattr(parent, name, value)


def are_made_to_call(parent: nn.Module) -> type[nn.Module] | None:
    """The class of torch.nn whose code `call_adapted_layers` mends for this parent, or None."""
    if type(parent) in (nn.MultiheadAttention, AdaptedMultiheadAttention):
        return nn.MultiheadAttention
    return nn.TransformerEncoderLayer if isinstance(parent, nn.TransformerEncoderLayer) else None
