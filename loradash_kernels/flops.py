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

from .calls import BackwardCall, ForwardCall, GroupBackwardCall, GroupForwardCall

COUNTER = "torch.utils.flop_counter"
Shape = Sequence[int]


def dash_linear_flops(*arguments: Any, **_: Any) -> int:
    """x W^T and the low-rank terms."""
    return _forward_flops(*arguments[:-1])


def low_rank_flops(y: Shape, x: Shape, *arguments: Any, **_: Any) -> int:
    """x D^T and P Q^T."""
    return _forward_flops(x, None, None, *arguments[:-1])


def _forward_flops(*fields: Any) -> int:
    """fields: those of ForwardCall before `base`, with shapes in place of tensors."""
    call: Any = ForwardCall(*fields, *[None] * (len(ForwardCall._fields) - len(fields)))
    (m, k), (n, r) = call.x, call.lora_b
    base = 0 if call.weight is None else n * k
    return 2 * m * (base + (k + n) * (r + _directions(call)))


def project_flops(x: Shape, lora_a: Shape, lora_b: Shape, dash_u: Shape | None, *arguments: Any, **_: Any) -> int:
    """x D^T."""
    return _forward_flops(x, None, None, lora_a, (0, lora_b[1]), dash_u, *arguments[:-1])


def backward_flops(*arguments: Any, **_: Any) -> int:
    """G = dy Q as far as it is wanted, then dx = dy W + (G * c) D, dA = G^T x and dB = dy^T P."""
    *fields, needs, _backend = arguments
    call: Any = BackwardCall(*fields, *needs)
    (m, k), (n, r), s = call.x, call.lora_b, _directions(call)
    columns_of_g = r + s if call.dx else r * call.da + s * call.dsigma
    base = n * k if call.dx and call.weight is not None else 0
    return 2 * m * (columns_of_g * n + base + (r + s) * k * call.dx + r * k * call.da + r * n * call.db_lora)


def experts_flops(x: Shape, weight: Shape, offsets: Shape, *arguments: Any, **_: Any) -> int:
    """What one expert with all rows costs."""
    stacked, rest = arguments[:6], arguments[6:]
    return dash_linear_flops(x, weight[1:], *map(_one, stacked), *rest)


def experts_backward_flops(dy: Shape, x: Shape, weight: Shape, *arguments: Any, **_: Any) -> int:
    """What one expert with all rows costs."""
    stacked, _offsets, *rest = arguments[:5], *arguments[5:]
    return backward_flops(dy, x, weight[1:], *map(_one, stacked), *rest)


def _one(stacked: Shape | None) -> Shape | None:
    return None if stacked is None else stacked[1:]


def group_flops(*arguments: Any, **_: Any) -> int:
    """The sum over the members."""
    fields = arguments[:-1]
    call: Any = GroupForwardCall(*fields, *[None] * (len(GroupForwardCall._fields) - len(fields)))
    shapes = zip(call.weight, call.lora_a, call.lora_b, call.dash_sigma, strict=True)
    return sum(
        _forward_flops(call.x, weight, None, a, b, None, None, sigma, None, 1.0, 0) for weight, a, b, sigma in shapes
    )


def group_backward_flops(*arguments: Any, **_: Any) -> int:
    """The sum over the members; adding their dx is no product."""
    *fields, needs, _backend = arguments
    call: Any = GroupBackwardCall(*fields, *[None] * (len(GroupBackwardCall._fields) - len(fields)))
    count = len(call.weight)
    found = 0
    for i in range(count):
        of_member = (call.dy[i], call.x, call.weight[i], call.lora_a[i], call.lora_b[i], None, None, call.dash_sigma[i])
        own = [needs[0], *needs[1 + i :: count]]
        found += backward_flops(*of_member, call.p, None, 1.0, 0, own, None)
    return found


def _directions(call: Any) -> int:
    return 0 if call.dash_sigma is None else call.dash_sigma[0]


def _register(counter: ModuleType) -> None:
    for name, formula in (
        ("dash_linear", dash_linear_flops),
        ("low_rank_update", low_rank_flops),
        ("dash_linear_backward", backward_flops),
        ("project", project_flops),
        ("dash_linear_after", lambda p, *arguments, **_: dash_linear_flops(*arguments)),
        ("low_rank_update_after", lambda p, *arguments, **_: low_rank_flops(*arguments)),
        ("dash_experts", experts_flops),
        ("dash_experts_backward", experts_backward_flops),
        ("dash_linear_group", group_flops),
        ("dash_linear_group_backward", group_backward_flops),
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
