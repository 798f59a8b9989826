"""A part of a fused projection's weight, seen as a linear layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class LinearSlice(nn.Linear):
    """Rows of the weight (N, K) of a `loradash.split.SplitLinear`, columns where that is stored as (K, N), as a linear layer.

    It has no parameters: weight and bias are views of the whole's with every look. To `apply_dash` it is a linear layer like
    any other, which an adapted one keeps whole (`base_layers.treatment`).

    Args:
        whole: the module that has the weight; this becomes a child of it.
        start, size: its rows.
    """

    whole: Any

    def __init__(self, whole: Any, start: int, size: int) -> None:
        nn.Module.__init__(self)
        # A reference, not a submodule: that would be a circle of modules.
        self.__dict__["whole"] = whole
        self.start, self.in_features, self.out_features = start, whole.in_features, size

    def rows_of(self, weight: Tensor) -> Tensor:
        """This part of a tensor of the whole weight's shape, as (N, K); one that is not whole (FSDP1, ZeRO-3) as it is."""
        if weight.dim() != 2:
            return weight
        rows = weight.t() if self.whole.transposed else weight
        return rows.narrow(0, self.start, self.out_features)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        return self.rows_of(self.whole.weight)

    @property
    def bias(self) -> Tensor | None:  # type: ignore[override]
        bias = self.whole.bias
        return None if bias is None else bias.narrow(0, self.start, self.out_features)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("weight", "bias"):
            raise ValueError(f"{self.whole.name}: the {name} of a part cannot be replaced; set that of the whole layer")
        super().__setattr__(name, value)

    @torch.no_grad()
    def take(self, rows: Tensor) -> Tensor:
        """Writes other values into these rows of the whole weight, as a new parameter of it: what is tied to it stays.

        Returns the rows before.
        """
        whole = self.whole
        if whole.before is None:
            # An assignment would make it a parameter of the module.
            whole.__dict__["before"] = whole.weight
            whole.weight = nn.Parameter(whole.weight.detach().clone(), requires_grad=False)
        whole.taken.add(self.start)
        self.weight.copy_(rows)
        return self.rows_of(whole.before)

    @torch.no_grad()
    def give_back(self, rows: Tensor) -> None:
        """Undoes `take`; with the last part the parameter of before is back."""
        whole = self.whole
        self.weight.copy_(rows)
        whole.taken.discard(self.start)
        if not whole.taken:
            whole.weight, whole.__dict__["before"] = whole.before, None
