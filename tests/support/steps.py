"""A training step of one layer whose mask can be read out of its own results, and ways to run it again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from loradash_kernels import dash_linear
from loradash_kernels.random import dropout_threshold
from loradash_kernels.testing import GRADIENTS, Case, check_error_rule, make_case

Results = dict[str, torch.Tensor]


def telling_case(shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device, dropout_p: float = 0.3) -> Case:
    """A case without base product: dx is zero exactly where x was dropped."""
    case = make_case(*shape, 16, 8, dtype, adapter_dtype=torch.float32, dropout_p=dropout_p, device=device)
    assert case.tensors["weight"] is not None
    case.tensors["weight"].zero_()
    return case


class Step:
    """Forward and backward pass of `dash_linear` over leaves of its own, whose gradients stay where they are."""

    def __init__(self, case: Case, backend: str | None = None, layer: Callable[..., Any] = dash_linear) -> None:
        self.case, self.layer = case, layer
        self.leaves = {
            n: t.detach().clone().requires_grad_(n in GRADIENTS) for n, t in case.tensors.items() if t is not None
        }
        for name in GRADIENTS:
            self.leaves[name].grad = torch.zeros_like(self.leaves[name])
        self.options: dict[str, Any] = {"scaling": case.scaling, "dropout_p": case.dropout_p}
        if backend is not None:
            self.options["backend"] = backend
        self.y = torch.empty_like(case.dy)

    def run(self) -> None:
        t = dict(self.leaves)
        for name in GRADIENTS:
            self.leaves[name].grad.zero_()  # type: ignore[union-attr]
        y = self.layer(t.pop("x"), t.pop("weight"), t.pop("bias"), **t, **self.options)
        self.y.copy_(y.detach())
        y.backward(self.case.dy)

    def results(self) -> Results:
        return {"y": self.y.clone(), **{n: self.leaves[n].grad.clone() for n in GRADIENTS}}  # type: ignore[union-attr]


def judged(case: Case, found: Results) -> torch.Tensor:
    """The mask (M, K) bool that these results of a telling case were made with: both passes used it, by the error rule."""
    mask = found["x"] != 0
    kept, wanted = float(mask.double().mean()), 1 - dropout_threshold(case.dropout_p) / 65536
    assert abs(kept - wanted) <= 6 * (wanted * (1 - wanted) / mask.numel()) ** 0.5, f"{kept} are kept, wanted {wanted}"
    check_error_rule(case, found, mask)
    return mask


class Recorded:
    """A step that can be replayed: a CUDA graph on a GPU; on the CPU, which has none, the step itself."""

    def __init__(self, step: Step) -> None:
        self.step, self.graph = step, None
        if step.case.device.type == "cuda":
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(3):
                    step.run()
            torch.cuda.current_stream().wait_stream(stream)
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                step.run()

    def replay(self) -> Results:
        if self.graph is None:
            self.step.run()
        else:
            self.graph.replay()
        return self.step.results()
