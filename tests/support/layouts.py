"""Cases whose tensors lie in memory in unusual ways."""

from __future__ import annotations

import torch


def slices(case):
    """Rows that begin at odd addresses."""
    for name, wide in (("x", 3), ("weight", 5)):
        t = case.tensors[name]
        case.tensors[name] = torch.nn.functional.pad(t, (1, wide))[:, 1 : 1 + t.shape[1]]
    case.dy = torch.nn.functional.pad(case.dy, (3, 0))[:, 3:]


def transposed(case):
    for name in ("x", "weight", "lora_a", "lora_b", "dash_u"):
        case.tensors[name] = case.tensors[name].t().contiguous().t()
    case.dy = case.dy.t().contiguous().t()
