"""What an arm must pass at a shape before it gets a time there.

It runs on all M rows with a dy that is zero outside some sampled rows and columns: what reaches those is a smaller problem,
whose float64 reference fits any card. Ours must keep to the error rule of `loradash_kernels.testing` there, dropout
included. Peers round more often than the rule allows, and draw masks of their own: without dropout, they may differ from the
formula, norm by norm, by what some roundings of their dtype and the sums come to.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from benchmarks.layers.variants import SCALING, Case
from loradash_kernels import testing
from loradash_kernels.random import draw_seed, dropout_rows, dropout_threshold

ROWS = 256
# The weight of the smaller problem has at most so many elements: half a gigabyte in float64.
WEIGHT_ELEMENTS = 1 << 26
# x, both factors, their products, c and the sum are rounded.
ROUNDINGS = 8
SEED = 7

ADAPTERS = ("lora_a", "lora_b", "dash_u", "dash_vt", "dash_sigma")


def spread_out(size: int, count: int, device: torch.device) -> Tensor:
    """Sorted indices, one of every one of `count` stripes, both ends among them; all where there are no more."""
    if size <= count:
        return torch.arange(size, device=device)
    edges = torch.linspace(0, size, count + 1, dtype=torch.float64).long()
    chosen = edges[:-1] + (torch.rand(count, generator=torch.Generator().manual_seed(SEED)) * edges.diff()).long()
    chosen[0], chosen[-1] = 0, size - 1
    return chosen.to(device)


def adapters_of(layer: nn.Module) -> dict[str, Tensor | None]:
    """The tensors of `testing.Case` that a variant has, by name; None for those that it has not."""
    layer = getattr(layer, "_orig_mod", layer)
    if hasattr(layer, "lora_A"):
        return {
            **dict.fromkeys(ADAPTERS),
            "lora_a": layer.lora_A["default"].weight,
            "lora_b": layer.lora_B["default"].weight,
        }
    return {name: getattr(layer, name, None) for name in ADAPTERS}


class Sample:
    """Some rows and columns of a case, as a problem of their own."""

    def __init__(self, case: Case, weight: Tensor, dropout: float) -> None:
        (m, k), (n, _) = case.x.shape, weight.shape
        device = case.x.device
        self.rows = spread_out(m, ROWS, device)
        self.columns = spread_out(n, max(1, WEIGHT_ELEMENTS // k), device)
        self.dy = torch.zeros_like(case.dy)
        self.dy[self.rows[:, None], self.columns] = case.dy[self.rows[:, None], self.columns]
        self.case, self.dropout = case, dropout
        self.adapters = adapters_of(case.layer)
        tensors: dict[str, Tensor | None] = {
            "x": case.x[self.rows],
            "weight": weight[self.columns],
            "bias": None,
            **self.adapters,
        }
        for name in ("lora_b", "dash_u"):
            t = self.adapters[name]
            tensors[name] = None if t is None else t[self.columns]
        detached = {name: None if t is None else t.detach() for name, t in tensors.items()}
        self.problem = testing.Case(detached, self.dy[self.rows][:, self.columns], SCALING, dropout, SEED)

    def run(self) -> dict[str, Tensor]:
        """Output and gradients of the case on the sample. AssertionError where a gradient lies outside of it."""
        case = self.case
        torch.manual_seed(SEED)
        y = case.forward()
        with case.within():
            y.backward(self.dy)
        found = {"y": y.detach()[self.rows][:, self.columns], "x": _gradient(case.x)[self.rows]}
        for name in ("lora_a", "lora_b", "dash_sigma"):
            t = self.adapters[name]
            if t is not None:
                found[name] = _gradient(t)
        rows, columns = (torch.ones(size, dtype=torch.bool, device=case.x.device) for size in case.dy.shape)
        rows[self.rows], columns[self.columns] = False, False
        outside = {"x": _gradient(case.x)[rows], "lora_b": found["lora_b"][columns]}
        for name, t in outside.items():
            assert not t.any(), f"the gradient of {name} is not zero where dy is"
        found["lora_b"] = found["lora_b"][self.columns]
        case.drop_gradients()
        return found

    def mask(self) -> Tensor:
        """What `run` keeps of the sampled rows, in our layers."""
        torch.manual_seed(SEED)
        seed = draw_seed(self.case.x.device)
        return dropout_rows(seed, dropout_threshold(self.dropout), self.rows, self.case.x.shape[1])


def _gradient(t: Tensor) -> Tensor:
    assert t.grad is not None, "a tensor that trains got no gradient"
    return t.grad


def check_ours(case: Case, weight: Tensor, dropout: float) -> None:
    """The error rule. Raises AssertionError where it is broken."""
    sample = Sample(case, weight, dropout)
    testing.check_error_rule(sample.problem, sample.run(), mask=sample.mask())


def tolerance(dtype: torch.dtype, depth: int, tf32: bool = False) -> float:
    """How far, norm by norm, a sum of `depth` products of operands in `dtype` may be from float64."""
    unit = 2.0**-11 if tf32 else torch.finfo(dtype).eps / 2
    return ROUNDINGS * unit + testing.LAMBDA * depth**0.5 * torch.finfo(torch.float32).eps / 2


def check_by_norms(case: Case, weight: Tensor, tf32: bool = False) -> None:
    """The formula, without dropout, within `tolerance`. Raises AssertionError where a tensor is further from it."""
    was_training = case.layer.training
    case.layer.eval()
    try:
        sample = Sample(case, weight, 0.0)
        found = sample.run()
    finally:
        case.layer.train(was_training)
    everything = torch.ones_like(sample.problem.x, dtype=torch.bool)
    wanted = testing.formula(sample.problem, torch.float64, mask=everything)
    allowed = tolerance(case.x.dtype, max(*weight.shape, ROWS), tf32)
    assert found.keys() == wanted.keys(), f"got {sorted(found)}, wanted {sorted(wanted)}"
    for name, value in found.items():
        distance = float((value.double() - wanted[name]).norm() / wanted[name].norm())
        # The comparison with NaN is false.
        assert distance <= allowed, f"{name} is {distance:.3g} from the formula, norm by norm; {allowed:.3g} is allowed"
