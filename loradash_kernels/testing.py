"""Inputs and the error rule, shared by tests and benchmarks.

The rule: for an output or gradient, with ref64 computed in float64 from the same inputs,

    max |ours - ref64| <= 2 max |torch - ref64| + atol

where `torch` is the plain formula in the dtype of x (adapters cast to it), the worst of a few orders of its sums, so that
one lucky sum does not set the mark, and atol what rounding ref64 itself may cost: half a unit in the last place of its
largest value.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from . import _triton
from .config import draw_seed, dropout_threshold, keep_scale
from .functional import dash_linear, low_rank_update
from .reference import dropout_mask

ORDERS = 3
GRADIENTS = ("x", "bias", "lora_a", "lora_b", "dash_sigma")


@dataclass
class Case:
    """One problem: every tensor of `dash_linear`, the gradient dy (M, N) of its output, and the options."""

    tensors: dict[str, Tensor | None]
    dy: Tensor
    scaling: float
    dropout_p: float
    seed: int
    device: str = "cpu"  # where `run` ran it, and so whose generator drew the seed of dropout

    @property
    def x(self) -> Tensor:
        x = self.tensors["x"]
        assert x is not None
        return x


def make_case(
    m: int,
    k: int,
    n: int,
    r: int = 4,
    s: int = 3,
    dtype: torch.dtype = torch.float32,
    *,
    adapter_dtype: torch.dtype | None = None,
    bias: bool = True,
    dropout_p: float = 0.0,
    scaling: float = 2.0,
    seed: int = 0,
) -> Case:
    """Gaussian inputs scaled so that every term of the output is of order one. s = 0: no dash tensors."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int, std: float = 1.0, to: torch.dtype = dtype) -> Tensor:
        return (torch.randn(*shape, generator=g) * std).to(to)

    wide = adapter_dtype or dtype
    tensors = {
        "x": normal(m, k),
        "weight": normal(n, k, std=max(k, 1) ** -0.5),
        "bias": normal(n) if bias else None,
        "lora_a": normal(r, k, std=max(k, 1) ** -0.5, to=wide),
        "lora_b": normal(n, r, std=max(r, 1) ** -0.5, to=wide),
        "dash_u": normal(n, s, to=wide) if s else None,
        "dash_vt": normal(s, k, std=max(k, 1) ** -0.5, to=wide) if s else None,
        "dash_sigma": normal(s, to=wide) if s else None,
    }
    return Case(tensors, normal(m, n), scaling, dropout_p, seed)


def run(case: Case, backend: str | None = None, base: bool = True) -> dict[str, Tensor]:
    """Output and gradients of `dash_linear` (or, without `base`, of `low_rank_update` on the library's base product)."""
    gpu = backend in ("cuda", "triton") and torch.cuda.is_available() and not _triton.interpreted()
    case.device = "cuda" if gpu else "cpu"
    leaves = {
        name: None if t is None else _moved(t, case.device).requires_grad_(name in GRADIENTS)
        for name, t in case.tensors.items()
    }
    torch.manual_seed(case.seed)
    x, weight, bias = leaves.pop("x"), leaves.pop("weight"), leaves.pop("bias")
    assert x is not None and weight is not None
    options = {"scaling": case.scaling, "dropout_p": case.dropout_p, "backend": backend, **leaves}
    if base:
        y = dash_linear(x, weight, bias, **options)  # type: ignore[arg-type]
    else:
        y = low_rank_update(F.linear(x, weight, bias), x, **options)  # type: ignore[arg-type]
    y.backward(_moved(case.dy, case.device))
    wanted = {"x": x, "bias": bias, **leaves}
    return {
        "y": y.detach().cpu(),
        **{n: t.grad.cpu() for n in GRADIENTS if (t := wanted.get(n)) is not None and t.grad is not None},
    }


def _moved(t: Tensor, device: str) -> Tensor:
    """A copy; on a GPU with the strides of t, gaps included."""
    if device == "cpu" or t.numel() == 0:
        return t.clone().to(device)
    extent = 1 + sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
    return t.as_strided((extent,), (1,)).to(device).as_strided(t.shape, t.stride())


def drawn_mask(case: Case) -> Tensor:
    """The keep mask (M, K) that `run` draws."""
    torch.manual_seed(case.seed)
    return dropout_mask(draw_seed(case.device).cpu(), dropout_threshold(case.dropout_p), *case.x.shape)


def formula(case: Case, dtype: torch.dtype, mask: Tensor | None = None) -> dict[str, Tensor]:
    """Output and gradients of the plain formula, every tensor cast to `dtype`, by autograd. mask: instead of the drawn."""
    t = {
        n: None if v is None else v.detach().clone().to(dtype).requires_grad_(n in GRADIENTS)
        for n, v in case.tensors.items()
    }
    x, weight, bias, a, b = t["x"], t["weight"], t["bias"], t["lora_a"], t["lora_b"]
    assert x is not None and weight is not None and a is not None and b is not None
    dropped = x
    if case.dropout_p:
        dropped = (
            x * (drawn_mask(case) if mask is None else mask).to(dtype) * keep_scale(dropout_threshold(case.dropout_p))
        )
    y = F.linear(x, weight, bias) + case.scaling * (dropped @ a.t() @ b.t())
    u, vt, sigma = t["dash_u"], t["dash_vt"], t["dash_sigma"]
    if u is not None and vt is not None and sigma is not None:
        y = y + (dropped @ vt.t() * sigma) @ u.t()
    y.backward(case.dy.to(dtype))
    return {"y": y.detach(), **{n: v.grad for n in GRADIENTS if (v := t[n]) is not None and v.grad is not None}}


# Which dimension of which tensor runs over M, K and N.
_AXES: dict[str, dict[str, int]] = {
    "x": {"m": 0, "k": 1}, "weight": {"n": 0, "k": 1}, "bias": {"n": 0}, "lora_a": {"k": 1}, "lora_b": {"n": 0},
    "dash_u": {"n": 0}, "dash_vt": {"k": 1}, "dash_sigma": {}, "dy": {"m": 0, "n": 1}, "y": {"m": 0, "n": 1},
}  # fmt: skip


def _shuffled_formula(case: Case, order: int) -> dict[str, Tensor]:
    """The plain formula with tokens and features in another order: the same numbers, other sums."""
    (m, k), n = case.x.shape, case.dy.shape[1]
    g = torch.Generator().manual_seed(order)
    orders = {axis: torch.randperm(size, generator=g) for axis, size in (("m", m), ("k", k), ("n", n))}

    def permuted(name: str, t: Tensor, back: bool = False) -> Tensor:
        for axis, dim in _AXES[name].items():
            t = t.index_select(dim, orders[axis].argsort() if back else orders[axis])
        return t

    tensors = {name: None if t is None else permuted(name, t) for name, t in case.tensors.items()}
    other = Case(tensors, permuted("dy", case.dy), case.scaling, case.dropout_p, case.seed)
    mask = permuted("x", drawn_mask(case)) if case.dropout_p else None
    return {name: permuted(name, t, back=True) for name, t in formula(other, case.x.dtype, mask).items()}


def check_error_rule(case: Case, ours: dict[str, Tensor]) -> None:
    """Raises AssertionError, naming the tensor and the errors, where the rule is broken or something is missing."""
    exact = formula(case, torch.float64)
    plain = [formula(case, case.x.dtype), *(_shuffled_formula(case, order) for order in range(ORDERS))]
    assert ours.keys() == exact.keys(), f"got {sorted(ours)}, wanted {sorted(exact)}"
    for name, value in ours.items():
        ref = exact[name]
        assert value.shape == ref.shape, f"{name}: shape {tuple(value.shape)}, wanted {tuple(ref.shape)}"
        if ref.numel() == 0:
            continue
        error, allowed = _worst(value, ref), 2 * max(_worst(p[name], ref) for p in plain) + _rounding(ref, case.x.dtype)
        assert error <= allowed, (
            f"{name}: error {error:.3e} exceeds {allowed:.3e} (largest value {ref.abs().max():.3e})"
        )


def _rounding(ref: Tensor, dtype: torch.dtype) -> float:
    return float(torch.where(ref.isfinite(), ref.abs(), 0).max()) * torch.finfo(dtype).eps / 2


def _worst(value: Tensor, ref: Tensor) -> float:
    """Largest error; NaN counts as infinite."""
    difference = (value.double() - ref).abs()
    return float(torch.where(difference.isnan(), torch.inf, difference).max())
