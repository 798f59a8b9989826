"""Inputs and the error rule, shared by tests and benchmarks.

The rule: every element of an output or gradient lies within an allowance of its value in float64,

    |ours - ref64| <= allowance

which follows from the arithmetic alone and is the same on every machine. `allowances` propagates it through the formula
of the layer: a sum of n products in the accumulator errs by at most gamma(n) |A| |B|, and every operand and every term may
be rounded to the dtype of x, every gradient to the dtype of its tensor.

It assumes that a library sums in the accumulator, too. On a GPU that takes torch.backends.cuda.matmul as it is by default
for float32 (no TF32), and allow_bf16_reduced_precision_reduction and allow_fp16_reduced_precision_reduction switched off:
where they are on, as they are by default, a product that is split along its depth may add its parts in 16 bits.

A case lies on one device, where it is run and judged: on a GPU the float64 reference is the GPU's.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .backends.reference import stacked
from .calls import accumulator
from .functional import dash_linear, low_rank_update
from .group import GroupMember, dash_linear_group
from .random import draw_seed, dropout_mask, dropout_threshold, keep_scale

GRADIENTS = ("x", "bias", "lora_a", "lora_b", "dash_sigma")


@dataclass
class Case:
    """One problem: every tensor of `dash_linear`, the gradient dy (M, N) of its output, and the options."""

    tensors: dict[str, Tensor | None]
    dy: Tensor
    scaling: float
    dropout_p: float
    seed: int

    @property
    def device(self) -> torch.device:
        """Where the tensors are, and whose generator draws the seed of dropout."""
        return self.dy.device

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
    device: torch.device | str = "cpu",
) -> Case:
    """Gaussian inputs scaled so that every term of the output is of order one. s = 0: no dash tensors.

    device: where they are drawn and lie; those of another type of device have other values.
    """
    g = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int, std: float = 1.0, to: torch.dtype = dtype) -> Tensor:
        return torch.randn(*shape, generator=g, device=device).mul_(std).to(to)

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
    """Output and gradients of `dash_linear` (or, without `base`, of `low_rank_update` on the library's base product), on the
    device of the case."""
    leaves = {
        name: None if t is None else _copied(t).requires_grad_(name in GRADIENTS) for name, t in case.tensors.items()
    }
    torch.manual_seed(case.seed)
    x, weight, bias = leaves.pop("x"), leaves.pop("weight"), leaves.pop("bias")
    assert x is not None and weight is not None
    options = {"scaling": case.scaling, "dropout_p": case.dropout_p, "backend": backend, **leaves}
    if base:
        y = dash_linear(x, weight, bias, **options)  # type: ignore[arg-type]
    else:
        y = low_rank_update(F.linear(x, weight, bias), x, **options)  # type: ignore[arg-type]
    y.backward(_copied(case.dy))
    wanted = {"x": x, "bias": bias, **leaves}
    return {
        "y": y.detach(),
        **{n: t.grad for n in GRADIENTS if (t := wanted.get(n)) is not None and t.grad is not None},
    }


def _copied(t: Tensor) -> Tensor:
    """A copy with the strides of t, gaps included."""
    if t.numel() == 0:
        return t.clone()
    extent = 1 + sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
    return t.as_strided((extent,), (1,)).clone().as_strided(t.shape, t.stride())


def drawn_mask(case: Case) -> Tensor:
    """The keep mask (M, K) that `run` draws."""
    torch.manual_seed(case.seed)
    return dropout_mask(draw_seed(case.device), dropout_threshold(case.dropout_p), *case.x.shape)


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
    y = F.linear(x, weight, bias) + (dropped @ a.t() * case.scaling) @ b.t()
    u, vt, sigma = t["dash_u"], t["dash_vt"], t["dash_sigma"]
    if u is not None and vt is not None and sigma is not None:
        y = y + (dropped @ vt.t() * sigma) @ u.t()
    y.backward(case.dy.to(dtype))
    return {"y": y.detach(), **{n: v.grad for n in GRADIENTS if (v := t[n]) is not None and v.grad is not None}}


# N. J. Higham and T. Mary, A New Approach to Probabilistic Rounding Error Analysis, SIAM J. Sci. Comput. 41(5), 2019,
# theorem 3.1: where rounding errors are independent and of mean zero, a sum of n products errs by more than
# lambda sqrt(n) u |a| |b| with a probability of at most 2 n exp(-lambda^2 / 2), and by more than n u |a| |b| never.
# All sums that the tests compare have fewer than 10^11 terms together: with lambda = 9 the probability that a right one
# among them errs by more is below 10^-6. u is that of the accumulator, in which hardware multiplies 16-bit operands exactly
# (numbers near 10^-38 apart: the bf16 instructions of CPUs take them for zero).
LAMBDA = 9.0


@dataclass(frozen=True)
class Bounded:
    """A tensor in float64 and, element by element, how far from it a value may be whose sums are taken in `sums`.

    cast: the tensor that a backend may take in its place, as a whole.
    """

    value: Tensor
    error: Tensor
    sums: torch.dtype
    cast: Tensor | None = None

    @classmethod
    def exactly(cls, value: Tensor, sums: torch.dtype, cast: torch.dtype | None = None) -> Bounded:
        """What is given; `cast` where a backend may cast it to this dtype."""
        value = value.detach().double()
        return cls(value, torch.zeros_like(value), sums, None if cast is None else value.to(cast).double())

    @property
    def unit(self) -> float:
        """Unit roundoff of the sums."""
        return torch.finfo(self.sums).eps / 2

    @property
    def choices(self) -> tuple[Tensor, ...]:
        return (self.value,) if self.cast is None else (self.value, self.cast)

    @property
    def most(self) -> Tensor:
        """The largest magnitude."""
        largest = self.value.abs() if self.cast is None else torch.maximum(self.value.abs(), self.cast.abs())
        return largest + self.error

    def rounded(self, dtype: torch.dtype, scale: float = 1.0) -> Bounded:
        """Each element, times `scale`, rounded to nearest in `dtype`, or left as it is. Rounding is monotone: what becomes
        of the ends of the interval bounds what becomes of the values between them, subnormals and overflow included."""
        ends = (self.value - self.error, self.value + self.error)
        lower, upper = (((end * scale).to(dtype).double() / scale - self.value).abs() for end in ends)
        return Bounded(self.value, torch.maximum(self.error, torch.maximum(lower, upper)), self.sums)

    def product(self, other: Bounded, depth: int | None = None) -> Bounded:
        """self @ other. depth: number of terms of the whole sum, where this product is one part of it."""
        n = self.value.shape[-1] if depth is None else depth
        gamma = min(n, LAMBDA * n**0.5) * self.unit
        value, size, other_size = self.value @ other.value, self.most, other.most
        error = self.error @ other_size + size @ other.error + gamma * (size @ other_size)
        casts = [(a @ b - value).abs() for a, b in itertools.product(self.choices, other.choices)]
        return Bounded(value, error + torch.stack(casts).amax(0), self.sums)

    def times(self, other: Bounded) -> Bounded:
        """self * other, element by element."""
        error = self.error * other.most + self.most * other.error + self.unit * self.most * other.most
        return Bounded(self.value * other.value, error, self.sums)

    def plus(self, other: Bounded) -> Bounded:
        error = self.error + other.error + self.unit * (self.most + other.most)
        return Bounded(self.value + other.value, error, self.sums)

    def of(self, view: Callable[[Tensor], Tensor]) -> Bounded:
        """A part of it, or another view."""
        return Bounded(view(self.value), view(self.error), self.sums, None if self.cast is None else view(self.cast))

    def t(self) -> Bounded:
        return self.of(torch.t)


def allowances(case: Case, mask: Tensor | None = None) -> dict[str, Tensor]:
    """How far each element of the output and of the gradients may be from its value in float64; not finite where a value
    of the dtype of x may overflow. mask: instead of the drawn.

    Letters and formulas are those of backends/reference.py. The base product, bias included, and the low-rank terms may be
    rounded before they are added: where a library computes the former they are, as in the plain formula. Or the low-rank
    terms come first, bias included, and the library adds its product to what they were rounded to. The factors of
    dash_sigma's gradient may not be rounded: few numbers, each a sum over all tokens, are not worth 16 bits.
    """
    dtype, t, (m, k), n = case.x.dtype, case.tensors, case.x.shape, case.dy.shape[1]
    sums, scale = accumulator(dtype), keep_scale(dropout_threshold(case.dropout_p))
    mask = drawn_mask(case) if mask is None else mask

    def exactly(value: Tensor | None, cast: torch.dtype | None = None) -> Bounded:
        assert value is not None
        return Bounded.exactly(value, sums, cast)

    adapters = (t[name] for name in ("lora_a", "lora_b", "dash_u", "dash_vt", "dash_sigma"))
    d, q, c = (exactly(v, dtype) for v in stacked(*adapters, case.scaling, torch.float64))  # type: ignore[call-arg, arg-type]
    x, weight, dy, keep = (exactly(v) for v in (case.x, t["weight"], case.dy, mask.double() * scale))
    c, keep = c.rounded(dtype), keep.rounded(sums)
    width = c.value.shape[0]
    rank = width - (0 if t["dash_sigma"] is None else t["dash_sigma"].shape[0])
    lora, dash = (lambda v: v[:, :rank]), (lambda v: v[:, rank:])

    # The keep scale may multiply x, which is then rounded, or the sums; in dx the sums, or c before G * c is rounded.
    dropped = replace(x.times(keep), cast=(case.x.detach() * mask * scale).double())
    p, g = dropped.product(d.t()), dy.product(q)
    scaled_p, scaled_g = (v.rounded(dtype).times(c).rounded(dtype) for v in (p, g))
    base = x.product(weight.t(), k + width)
    addends = [] if t["bias"] is None else [exactly(t["bias"])]
    base_first = reduce(Bounded.plus, addends, base).rounded(dtype)
    low = exactly(torch.zeros_like(x.value))
    for part in (lora, dash):
        term = scaled_p.of(part).product(q.of(part).t(), k + width)
        base_first = base_first.plus(term.rounded(dtype)).rounded(dtype)
        addends.append(term)
        term = scaled_g.rounded(dtype, scale).of(part).product(d.t().of(part).t(), n + width)
        low = low.plus(term.rounded(dtype)).rounded(dtype)
    low_first = reduce(Bounded.plus, addends).rounded(dtype).plus(base).rounded(dtype)
    dx = dy.product(weight, n + width).rounded(dtype).plus(low.times(keep).rounded(dtype))

    ones = exactly(dy.value.new_ones(1, m))
    gradients = {
        "x": dx,
        "lora_a": scaled_g.of(lora).t().product(dropped),
        "lora_b": dy.t().product(scaled_p.of(lora)),
        "bias": ones.product(dy),
        "dash_sigma": ones.product(g.times(p).of(dash)),
    }
    found = {
        name: b.rounded(v.dtype).error.view(v.shape) for name, b in gradients.items() if (v := t[name]) is not None
    }
    return {"y": torch.maximum(base_first.error, low_first.error), **found}


def error_ratios(case: Case, ours: dict[str, Tensor], mask: Tensor | None = None) -> dict[str, Tensor]:
    """|ours - ref64| / allowance of every element: 0 where both are zero, infinite for NaN. mask: instead of the drawn.

    Raises AssertionError where a tensor is missing, is one too many or has another shape, and where the case may overflow.
    """
    exact, allowed = formula(case, torch.float64, mask), allowances(case, mask)
    # The oracle errs too: its unit roundoff over that of our sums.
    oracle = torch.finfo(torch.float64).eps / torch.finfo(accumulator(case.x.dtype)).eps
    assert ours.keys() == exact.keys(), f"got {sorted(ours)}, wanted {sorted(exact)}"
    found = {}
    for name, value in ours.items():
        ref = exact[name]
        assert value.shape == ref.shape, f"{name}: shape {tuple(value.shape)}, wanted {tuple(ref.shape)}"
        assert allowed[name].isfinite().all(), f"{name}: inputs that may overflow {case.x.dtype} have no allowance"
        error = (value.double() - ref).abs().nan_to_num(torch.inf, torch.inf)
        found[name] = torch.where(error == 0, 0.0, error / (allowed[name] * (1 + oracle)))
    return found


def check_error_rule(case: Case, ours: dict[str, Tensor], mask: Tensor | None = None) -> None:
    """Raises AssertionError, naming the tensor and its worst element, where the rule is broken or something is missing.

    mask: what was kept, (M, K), where `run` did not draw it.
    """
    for name, ratios in error_ratios(case, ours, mask).items():
        if (ratios > 1).any():
            index = torch.unravel_index(ratios.argmax(), ratios.shape)
            place = ", ".join(str(int(i)) for i in index)
            raise AssertionError(
                f"{name}[{place}] is {ours[name][index]}: its error is {ratios.max():.3g} of what is allowed"
            )


def make_group(
    m: int, k: int, members: Sequence[tuple[int, int, int]], dtype: torch.dtype, **options: Any
) -> list[Case]:
    """Cases of one x and one mask, one for every (N, r, s); options are those of `make_case`."""
    seed = options.pop("seed", 0)
    cases = [make_case(m, k, n, r, s, dtype, seed=seed + i, **options) for i, (n, r, s) in enumerate(members)]
    for case in cases:
        case.tensors["x"], case.seed = cases[0].x, seed
    return cases


def run_group(cases: list[Case], backend: str | None = None) -> list[dict[str, Tensor]]:
    """`dash_linear_group` of cases that `make_group` made: what `run` gives for each, and the dx of all as that of each."""
    leaves: list[dict[str, Any]] = [
        {
            n: None if t is None else _copied(t).requires_grad_(n in GRADIENTS)
            for n, t in case.tensors.items()
            if n != "x"
        }
        for case in cases
    ]
    first = cases[0]
    x = _copied(first.x).requires_grad_()
    members = [GroupMember(**own, scaling=case.scaling) for own, case in zip(leaves, cases, strict=True)]
    torch.manual_seed(first.seed)
    outputs = dash_linear_group(x, members, dropout_p=first.dropout_p, backend=backend)
    torch.autograd.backward(outputs, [_copied(case.dy) for case in cases])
    assert x.grad is not None
    return [
        {"y": y.detach(), "x": x.grad, **{n: t.grad for n, t in own.items() if t is not None and t.grad is not None}}
        for y, own in zip(outputs, leaves, strict=True)
    ]


def check_group_error_rule(cases: list[Case], ours: list[dict[str, Tensor]]) -> None:
    """The rule for every member; for dx, which is the sum over the members, the sum of what they are allowed, and the
    rounding of every partial sum to the dtype of x. Raises AssertionError as `check_error_rule`."""
    exact = [formula(case, torch.float64)["x"] for case in cases]
    for i, (case, found, dx) in enumerate(zip(cases, ours, exact, strict=True)):
        try:
            check_error_rule(case, {**found, "x": dx.to(case.x.dtype)})
        except AssertionError as error:
            raise AssertionError(f"member {i}: {error}") from error
    allowed = torch.stack([allowances(case)["x"] for case in cases]).sum(0)
    size = torch.stack([dx.abs() for dx in exact]).sum(0) + allowed
    # A sum of g numbers is rounded g - 1 times; below the smallest normal number the unit is that of the dtype.
    limits = torch.finfo(cases[0].x.dtype)
    allowed = allowed + (len(cases) - 1) * (limits.eps / 2 * size + limits.smallest_normal * limits.eps)
    wrong = (ours[0]["x"].double() - torch.stack(exact).sum(0)).abs().nan_to_num(torch.inf)
    if (wrong > allowed).any():
        raise AssertionError(f"the group's dx errs by {wrong.max():.3g}, and {allowed.max():.3g} at most is allowed")
