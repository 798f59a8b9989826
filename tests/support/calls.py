"""Calls as the operators make them, for kernels that tests run by themselves."""

from __future__ import annotations

import torch

from loradash_kernels.calls import BackwardCall, ForwardCall
from loradash_kernels.random import draw_seed, dropout_mask, dropout_threshold, window
from loradash_kernels.testing import Case

Outputs = dict[str, torch.Tensor | None]
ADAPTERS = ("lora_a", "lora_b", "dash_u", "dash_vt", "dash_sigma")
GRADIENTS = ("x", "lora_a", "lora_b", "dash_sigma", "bias")


# Row and column of a larger matrix, of which x is the part that begins there.
Place = tuple[int, int]


def drawn_seed(case: Case, place: Place | None = None) -> torch.Tensor | None:
    """The seed of dropout that `testing.run` draws, for the larger matrix where x has a place in one."""
    torch.manual_seed(case.seed)
    if not case.dropout_p:
        return None
    return draw_seed(case.device) if place is None else window(draw_seed(case.device), *place)


def mask_at(case: Case, place: Place) -> torch.Tensor:
    """(M, K) bool: the part at this place of the mask that `testing.run` would draw for the whole."""
    seed, (m, k) = drawn_seed(case), case.x.shape
    assert seed is not None
    whole = dropout_mask(seed, dropout_threshold(case.dropout_p), place[0] + m, place[1] + k)
    return whole[place[0] :, place[1] :]


def outputs(case: Case, base: bool = True) -> Outputs:
    """y, P and every gradient by the names of `testing.run`, of NaN; without `base` the bias is the base layer's."""
    t, (m, k), n = case.tensors, case.x.shape, case.dy.shape[1]
    rank, directions = t["lora_a"].shape[0], 0 if t["dash_sigma"] is None else t["dash_sigma"].shape[0]

    def poisoned(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.full(shape, float("nan"), dtype=dtype, device=case.device)

    return {
        "y": poisoned(m, n, dtype=case.x.dtype),
        "p": poisoned(m, rank + directions),
        "x": poisoned(m, k, dtype=case.x.dtype),
        "lora_a": poisoned(rank, k),
        "lora_b": poisoned(n, rank),
        "dash_sigma": poisoned(directions) if directions else None,
        "bias": poisoned(n) if t["bias"] is not None and base else None,
    }


def calls(
    case: Case, out: Outputs, seed: torch.Tensor | None = None, base: torch.Tensor | None = None
) -> tuple[ForwardCall, BackwardCall]:
    """The forward and the backward call of a case. base: the base product, which replaces weight and bias."""
    t = case.tensors
    weight, bias = (t["weight"], t["bias"]) if base is None else (None, None)
    adapters, options = [t[name] for name in ADAPTERS], (seed, case.scaling, dropout_threshold(case.dropout_p))
    grads = [out.get(name) for name in GRADIENTS]
    return (
        ForwardCall(case.x, weight, bias, *adapters, *options, base, out["y"], out["p"]),
        BackwardCall(case.dy, case.x, weight, *adapters, out["p"], *options, *grads),
    )


def base_product(case: Case) -> torch.Tensor:
    return torch.nn.functional.linear(case.x, case.tensors["weight"], case.tensors["bias"])


def results(case: Case, out: Outputs, base: bool) -> dict[str, torch.Tensor]:
    """Output and gradients as `testing.run` gives them: with the base layer's own gradients where it was apart."""
    found = {name: value for name, value in out.items() if value is not None and name != "p"}
    if not base:
        found["x"] += case.dy @ case.tensors["weight"]
        if case.tensors["bias"] is not None:
            found["bias"] = case.dy.float().sum(0)
    return {name: value.to(case.tensors.get(name, case.x).dtype) for name, value in found.items()}
