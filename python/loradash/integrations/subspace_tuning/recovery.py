"""The directions of a checkpoint that has lost them: the authors' `lora_state_dict` keeps no U and V."""

from __future__ import annotations

import torch
from torch import Tensor

ROUNDING = 1e-3
"""How far singular values may be from the file's, relative to the largest: two SVDs in float32 differ by far less, another
weight's by far more."""


@torch.no_grad()
def recovered_directions(
    weight: Tensor,  # as the layer stores it
    sigma: Tensor,  # (n,)
    delta: Tensor,  # (n,)
    s: int,
) -> tuple[Tensor, Tensor]:
    """U (N, s) and Vᵀ (s, K) of the s highest |delta| / |sigma|, from the SVD of the frozen weight, in their order.

    sigma and delta are `lora_change_a` and `lora_change_bb`, what the authors' launch leaves behind. Raises ValueError where
    the weight has other singular values: it is not the one that the checkpoint was trained on.
    """
    u, found, vt = torch.linalg.svd(weight.detach().float(), full_matrices=False)
    if found.shape != sigma.shape or delta.shape != sigma.shape:
        raise ValueError(
            f"lora_change_a {tuple(sigma.shape)} and lora_change_bb {tuple(delta.shape)} do not fit a weight "
            f"{tuple(weight.shape)}"
        )
    sigma, delta = sigma.to(found), delta.to(found)
    gap = float((found - sigma).abs().max() / found[0].clamp_min(torch.finfo(found.dtype).tiny))
    if not gap < ROUNDING:
        raise ValueError(
            f"lora_change_a are not the singular values of this weight (off by {gap:.1e} of the largest); give the weights "
            "that the checkpoint was trained on"
        )
    which = torch.topk(delta.abs() / sigma.abs(), s).indices
    return u[:, which].contiguous(), vt[which].contiguous()
