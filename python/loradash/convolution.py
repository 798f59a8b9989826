"""`DashConvolution`: a convolution that is a linear layer over channels, with LoRA-Dash adapters."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .base_layers import Treatment, pointwise_refusal
from .linear import DashLinear
from .quantised import check_differentiable


def _treatment(module: nn.Module) -> Treatment:
    problem = pointwise_refusal(module)
    if problem is not None:
        raise ValueError(problem)
    return "kept whole"


class DashConvolution(DashLinear):
    """nn.Conv1d, nn.Conv2d or nn.Conv3d with a kernel of one element, as (N, K) over channels; made by `from_linear`.

    The convolution is kept whole: the low-rank terms are added to its output, over the pixels that its stride takes. Bytes
    beside the convolution: x and y once more each, and once more where their channels do not come last in memory.
    """

    _treatment = staticmethod(_treatment)

    @property
    def unit_kernel(self) -> tuple[int, ...]:  # type: ignore[override]
        return (1,) * (self.weight.dim() - 2)

    def weight_nk(self) -> Tensor:
        """The weight as (N, K): a view where memory allows it."""
        return self.oriented(self.weight.detach())

    def oriented(self, weight: Tensor) -> Tensor:
        """A tensor of the weight's shape as (N, K)."""
        return weight.flatten(1)

    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """input (..., K, *space) to (..., N, *space), fewer pixels where the convolution has a stride."""
        base: Any = self.base
        y = base(input, *args, **kwargs)
        check_differentiable(self._label(), base, input, y)
        if not self.enabled or self.merged:
            return y
        space = len(base.stride)
        taken: Any = (..., *(slice(None, None, step) for step in base.stride))
        channels = -1 - space
        out = self._add_low_rank(y.movedim(channels, -1), input[taken].movedim(channels, -1)).movedim(-1, channels)
        # Code behind a convolution may count on how its output lies in memory.
        return out.contiguous() if y.is_contiguous() else out
