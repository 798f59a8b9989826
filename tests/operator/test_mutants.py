"""The error rule itself: the plain formula keeps it in every dtype, and whatever sums wrongly breaks it."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import pytest
import torch
from support.shapes import DTYPES, SHAPES

from loradash_kernels.random import dropout_threshold, keep_scale
from loradash_kernels.testing import Case, check_error_rule, drawn_mask, error_ratios, formula, make_case

Results = dict[str, torch.Tensor]


def results(case: Case, sums: torch.dtype, mask: torch.Tensor | None = None) -> Results:
    """The plain formula in the dtype `sums`, then in the dtypes of the layer."""
    return {name: v.to(case.tensors.get(name, case.x).dtype) for name, v in formula(case, sums, mask).items()}


def both_ways(shape: tuple[int, ...], dtype: torch.dtype, dropout_p: float, seed: int = 0):
    """A case and the dtype of its formula: everything in the dtype of x, as PyTorch's layers have it; and fp32 adapters and
    sums, rounded at the end, as the kernels have it."""
    yield make_case(*shape, dtype, dropout_p=dropout_p, seed=seed), dtype
    if dtype != torch.float32:
        yield make_case(*shape, dtype, adapter_dtype=torch.float32, dropout_p=dropout_p, seed=seed), torch.float32


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_plain_formula_keeps_the_rule(shape, dtype):
    for seed in range(12):
        for case, sums in both_ways(shape, dtype, (0.0, 0.1, 0.5)[seed % 3], seed):
            found = results(case, sums)
            # 16 bits will not do for the factors of this gradient.
            if sums != torch.float32:
                found["dash_sigma"] = results(case, torch.float32)["dash_sigma"]
            check_error_rule(case, found)


def low_rank_terms_first(case: Case) -> Results:
    """As kernels beside a vendor's product have it: bias and low-rank terms are rounded, and so is the sum of the product and
    what they were rounded to; dx likewise."""
    dtype, t = case.x.dtype, case.tensors
    found = results(case, torch.float32)
    alone = formula(scaled(case, "weight", 0), torch.float32)
    base = case.x.float() @ t["weight"].float().t()
    found["y"] = (alone["y"].to(dtype).float() + base).to(dtype)
    found["x"] = (alone["x"].to(dtype).float() + case.dy.float() @ t["weight"].float()).to(dtype)
    return found


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_low_rank_terms_may_come_first(shape, dtype):
    """Also where the product cancels what it is added to, and leaves the rounding of a large number."""
    for cancels in (False, True):
        case = make_case(*shape, dtype, adapter_dtype=torch.float32, dropout_p=0.1)
        if cancels:
            case.tensors["bias"] = -(case.x[0].double() @ case.tensors["weight"].double().t()).to(dtype)
            case = scaled(scaled(case, "lora_b", 1 / 64), "dash_u", 1 / 64)
        check_error_rule(case, low_rank_terms_first(case))


@pytest.mark.parametrize("fault", ["missing", "surplus", "shape", "nan"])
def test_what_is_no_result_at_all(fault):
    case = make_case(5, 6, 7)
    found = results(case, torch.float32)
    check_error_rule(case, found)
    if fault == "missing":
        del found["bias"]
    elif fault == "surplus":
        found["weight"] = case.tensors["weight"]
    elif fault == "shape":
        found["y"] = found["y"].t()
    else:
        found["y"][3, 2] = torch.nan
    with pytest.raises(AssertionError, match=r"got \[|shape|y\[3, 2\] is nan"):
        check_error_rule(case, found)


def test_no_allowance_where_numbers_overflow():
    case = make_case(5, 6, 7, dtype=torch.float16)
    case.tensors["lora_a"] *= 60000
    with pytest.raises(AssertionError, match="may overflow"):
        check_error_rule(case, results(case, torch.float16))


def scaled(case: Case, name: str, factor: float, index=...) -> Case:
    """Elements of a tensor times `factor`: 0 leaves them out, 2 counts them twice."""
    t = case.tensors[name].clone()
    t[index] *= factor
    return replace(case, tensors={**case.tensors, name: t})


def without_last_row(case: Case, sums: torch.dtype) -> Results:
    return results(replace(case, dy=torch.cat((case.dy[:-1], torch.zeros_like(case.dy[-1:])))), sums)


def with_mask(change: Callable[[torch.Tensor, float], torch.Tensor]):
    def mutant(case: Case, sums: torch.dtype) -> Results:
        return results(case, sums, change(drawn_mask(case), keep_scale(dropout_threshold(case.dropout_p))))

    return mutant


def of_case(change: Callable[[Case], Case]):
    return lambda case, sums: results(change(case), sums)


def without_its_sigma(case: Case) -> Case:
    sigma = case.tensors["dash_sigma"]
    return replace(case, tensors={**case.tensors, "dash_sigma": torch.cat((sigma[:-1], torch.ones_like(sigma[-1:])))})


def p_in_bf16(case: Case, sums: torch.dtype) -> Results:
    t, scale = case.tensors, keep_scale(dropout_threshold(case.dropout_p))
    p = ((case.x * drawn_mask(case) * scale) @ t["lora_a"].t()).bfloat16().float()
    lost = p - (case.x * drawn_mask(case) * scale) @ t["lora_a"].t()
    y = results(case, sums)["y"] + case.scaling * lost @ t["lora_b"].t()
    return {"y": y, "lora_b": case.scaling * case.dy.t() @ p}


def base_summed_in_16_bits(case: Case, sums: torch.dtype) -> Results:
    x, weight = case.x, case.tensors["weight"]
    base = torch.zeros_like(case.dy)
    for k in range(x.shape[1]):
        base += x[:, k, None] * weight[None, :, k]
    return {"y": results(scaled(case, "weight", 0), sums)["y"] + base}


class Mutant(NamedTuple):
    """What it gets wrong, its results, and for which (shape, dtype) that makes a difference."""

    wrong: tuple[str, ...]
    results: Callable[[Case, torch.dtype], Results]
    differs: Callable[[tuple[int, ...], torch.dtype], bool] = lambda shape, dtype: True


def few_rows(shape: tuple[int, ...], dtype: torch.dtype) -> bool:
    """One row of hundreds is less than what bf16 may cost them all: rounding P for dB, casting the adapters for dsigma."""
    return shape[0] < 300 or dtype != torch.bfloat16


LAST = (..., -1)
MASKED = ("y", "x", "lora_a")
MUTANTS = {
    "x W^T without the last column of K": Mutant(("y",), of_case(lambda c: scaled(c, "weight", 0, LAST))),
    "x A^T without the last column of K": Mutant(("y", "lora_b"), of_case(lambda c: scaled(c, "lora_a", 0, LAST))),
    "x Vt^T without the last column of K": Mutant(
        ("y", "dash_sigma"), of_case(lambda c: scaled(c, "dash_vt", 0, LAST))
    ),
    "dy W without the last column of N": Mutant(("x",), of_case(lambda c: scaled(c, "weight", 0, -1))),
    "dy B without the last column of N": Mutant(("x", "lora_a"), of_case(lambda c: scaled(c, "lora_b", 0, -1))),
    "dy U without the last column of N": Mutant(("x", "dash_sigma"), of_case(lambda c: scaled(c, "dash_u", 0, -1))),
    "dA without the last row of M": Mutant(("lora_a",), without_last_row),
    "dB without the last row of M": Mutant(("lora_b",), without_last_row, few_rows),
    "dsigma without the last row of M": Mutant(("dash_sigma",), without_last_row, few_rows),
    "db without the last row of M": Mutant(("bias",), without_last_row),
    "a rank column twice in y": Mutant(("y",), of_case(lambda c: scaled(c, "lora_b", 2, LAST))),
    "a rank column twice in dx": Mutant(("x",), of_case(lambda c: scaled(c, "lora_a", 2, -1))),
    "a direction left out": Mutant(("y", "x"), of_case(lambda c: scaled(c, "dash_sigma", 0, -1))),
    "a direction without its sigma": Mutant(("y", "x"), of_case(without_its_sigma)),
    "the dash term times scaling": Mutant(("y", "x"), of_case(lambda c: scaled(c, "dash_sigma", c.scaling))),
    "bias left out": Mutant(("y",), of_case(lambda c: scaled(c, "bias", 0))),
    "bias twice": Mutant(("y",), of_case(lambda c: scaled(c, "bias", 2))),
    "the mask of the next k": Mutant(MASKED, with_mask(lambda m, _: m.roll(1, 1)), lambda shape, _: shape[1] > 1),
    "the mask of the next m": Mutant(MASKED, with_mask(lambda m, _: m.roll(1, 0)), lambda shape, _: shape[0] > 1),
    "keep scale left out": Mutant((*MASKED, "lora_b", "dash_sigma"), with_mask(lambda m, scale: m / scale)),
    "P in bf16 under fp32": Mutant(("y", "lora_b"), p_in_bf16, lambda _, dtype: dtype == torch.float32),
    "x W^T summed in 16 bits": Mutant(
        ("y",), base_summed_in_16_bits, lambda shape, dtype: min(shape[:2]) > 60 and dtype != torch.float32
    ),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_break_the_rule(name):
    """In every shape and dtype, with an ordinary result for whatever a mutant gets right."""
    mutant = MUTANTS[name]
    for shape, dtype in itertools.product(SHAPES, DTYPES):
        if not mutant.differs(shape, dtype):
            continue
        for case, sums in both_ways(shape, dtype, 0.1):
            found = mutant.results(case, sums)
            ratios = error_ratios(case, {**results(case, torch.float32), **{n: found[n] for n in mutant.wrong}})
            worst = max(float(ratios[n].max()) for n in mutant.wrong)
            print(f"{name}, {shape}, {dtype} by sums in {sums}: {worst:.3g} of what is allowed")
            assert worst > 1, (shape, dtype, sums)
