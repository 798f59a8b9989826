"""What the operators cost, for torch.utils.flop_counter.FlopCounterMode: products of matrices, as PyTorch counts them.

That module brings a compiler with it, so the formulas are registered when somebody imports it.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch

COUNTER = "torch.utils.flop_counter"
Shape = Sequence[int]


def low_rank_flops(
    y: Shape, x: Shape, lora_a: Shape, lora_b: Shape, dash_u: Any, dash_vt: Any, dash_sigma: Shape | None, *_: Any,
    **__: Any,
) -> int:  # fmt: skip
    """x D^T and P Q^T."""
    (m, k), n = x, lora_b[0]
    return 2 * m * (k + n) * (lora_a[0] + _directions(dash_sigma))


def dash_linear_flops(
    x: Shape, weight: Shape, bias: Any, lora_a: Shape, lora_b: Shape, dash_u: Any, dash_vt: Any,
    dash_sigma: Shape | None, *_: Any, **__: Any,
) -> int:  # fmt: skip
    """x W^T and the low-rank terms."""
    low = low_rank_flops((), x, lora_a, lora_b, dash_u, dash_vt, dash_sigma)
    return 2 * x[0] * x[1] * weight[0] + low


def backward_flops(
    dy: Shape, x: Shape, weight: Shape | None, lora_a: Shape, lora_b: Shape, dash_u: Any, dash_vt: Any,
    dash_sigma: Shape | None, p: Shape, seed: Any, scaling: float, threshold: int, needs: Sequence[bool], *_: Any,
    **__: Any,
) -> int:  # fmt: skip
    """G = dy Q as far as it is wanted, then dx = dy W + (G * c) D, dA = G^T x and dB = dy^T P."""
    (m, k), n = x, dy[1]
    r, s = lora_a[0], _directions(dash_sigma)
    dx, da, db_lora, dsigma, _dbias = needs
    columns_of_g = r + s if dx else r * da + s * dsigma
    base = n * k if dx and weight is not None else 0
    return 2 * m * (columns_of_g * n + base + (r + s) * k * dx + r * k * da + r * n * db_lora)


def _directions(dash_sigma: Shape | None) -> int:
    return 0 if dash_sigma is None else dash_sigma[0]


def _register(counter: ModuleType) -> None:
    for name, formula in (
        ("dash_linear", dash_linear_flops),
        ("low_rank_update", low_rank_flops),
        ("dash_linear_backward", backward_flops),
    ):
        counter.register_flop_formula(getattr(torch.ops.loradash, name))(formula)


class _OnImport(MetaPathFinder):
    """Registers the formulas right after the flop counter is imported, then is gone."""

    def find_spec(self, fullname: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if fullname != COUNTER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_register(module: ModuleType) -> None:
                execute(module)
                _register(module)

            spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


def register() -> None:
    """Now, or when the flop counter is imported."""
    if COUNTER in sys.modules:
        _register(sys.modules[COUNTER])
    else:
        sys.meta_path.insert(0, _OnImport())
