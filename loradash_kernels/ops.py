"""Operators of the `loradash` namespace: their schemas and the memory of their results.

One schema per operator, here and nowhere else. Its arguments are the fields of a call (`calls`) as far as the caller
knows them, and `y` of low_rank_update is the field `base`; a test holds the names together. One `allocate_*` serves the real and
the fake implementation alike, so their shapes, dtypes and strides agree by construction. A backend fills what it is given.
"""

from __future__ import annotations

from collections.abc import Callable
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor

from .backends import extension, registry
from .calls import BackwardCall, ForwardCall, GroupBackwardCall, GroupForwardCall, accumulator
from .random import check_seed

LIBRARY = torch.library.Library("loradash", "DEF")

_ADAPTERS = "Tensor lora_a, Tensor lora_b, Tensor? dash_u, Tensor? dash_vt, Tensor? dash_sigma"
_OPTIONS = "Tensor? seed, float scaling, int threshold"

_OF_LINEAR = f"Tensor x, Tensor weight, Tensor? bias, {_ADAPTERS}, {_OPTIONS}, str? backend"
_OF_UPDATE = f"Tensor y, Tensor x, {_ADAPTERS}, {_OPTIONS}, str? backend"

LIBRARY.define(f"dash_linear({_OF_LINEAR}) -> (Tensor y, Tensor p)")
LIBRARY.define(f"low_rank_update({_OF_UPDATE}) -> (Tensor out, Tensor p)")
LIBRARY.define(
    f"dash_linear_backward(Tensor dy, Tensor x, Tensor? weight, {_ADAPTERS}, Tensor p, {_OPTIONS}, bool[] needs, "
    "str? backend) -> (Tensor dx, Tensor da, Tensor db_lora, Tensor dsigma, Tensor dbias)"
)
# The same layers in two steps, for a compiler that is to keep P and compute y again: `checkpointing` says when.
LIBRARY.define(f"project(Tensor x, {_ADAPTERS}, {_OPTIONS}, str? backend) -> Tensor p")
LIBRARY.define(f"dash_linear_after(Tensor p, {_OF_LINEAR}) -> Tensor y")
LIBRARY.define(f"low_rank_update_after(Tensor p, {_OF_UPDATE}) -> Tensor out")

_MEMBERS = "Tensor[] lora_a, Tensor[] lora_b, Tensor[] dash_u, Tensor[] dash_vt, Tensor[] dash_sigma"
_GROUP_OPTIONS = "Tensor? seed, float[] scaling, int threshold"

LIBRARY.define(
    f"dash_linear_group(Tensor x, Tensor[] weight, Tensor[] bias, {_MEMBERS}, {_GROUP_OPTIONS}, str? backend) "
    "-> (Tensor[] y, Tensor p)"
)
LIBRARY.define(
    f"dash_linear_group_backward(Tensor[] dy, Tensor x, Tensor[] weight, {_MEMBERS}, Tensor p, {_GROUP_OPTIONS}, "
    "bool[] needs, str? backend) -> (Tensor dx, Tensor[] da, Tensor[] db_lora, Tensor[] dsigma, Tensor[] dbias)"
)

Gradients = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
GroupGradients = tuple[Tensor, list[Tensor], list[Tensor], list[Tensor], list[Tensor]]

# The shapes of results follow from these fields.
_SHAPES = ("x", "lora_a", "lora_b", "dash_sigma")
_of_group = itemgetter(*map(GroupForwardCall._fields.index, _SHAPES))
_of_group_backward = itemgetter(*map(GroupBackwardCall._fields.index, _SHAPES))
# The schema has counted the fields of a call: counting them again would take 0.1 us.
_made = tuple.__new__
_of_forward = itemgetter(*map(ForwardCall._fields.index, _SHAPES))
_of_backward = itemgetter(*map(BackwardCall._fields.index, _SHAPES))


def allocate_forward(x: Tensor, lora_a: Tensor, lora_b: Tensor, dash_sigma: Tensor | None) -> tuple[Tensor, Tensor]:
    """y (M, N) in the dtype of x, P (M, R) in the accumulator's."""
    m, width = x.shape[0], lora_a.shape[0]
    if dash_sigma is not None:
        width += dash_sigma.shape[0]
    # Sizes are passed one by one: PyTorch takes 0.6 us longer to read a tuple of them.
    return x.new_empty(m, lora_b.shape[0]), x.new_empty(m, width, dtype=accumulator(x.dtype))


def allocate_backward(
    needs: list[bool], x: Tensor, lora_a: Tensor, lora_b: Tensor, dash_sigma: Tensor | None
) -> Gradients:
    """dx, da, db_lora, dsigma, dbias; those not needed are empty (0,), in the dtype of x."""
    wide = accumulator(x.dtype)
    dx, da, db_lora, dsigma, dbias = needs
    directions = 0 if dash_sigma is None else dash_sigma.shape[0]
    return (
        x.new_empty(*x.shape) if dx else x.new_empty(0),
        x.new_empty(*lora_a.shape, dtype=wide) if da else x.new_empty(0),
        x.new_empty(*lora_b.shape, dtype=wide) if db_lora else x.new_empty(0),
        x.new_empty(directions, dtype=wide) if dsigma else x.new_empty(0),
        x.new_empty(lora_b.shape[0], dtype=wide) if dbias else x.new_empty(0),
    )


def dash_linear(*arguments: Any, base: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """y and P. The arguments are the fields of ForwardCall before `base`, and the backend."""
    fields, backend = arguments[:-1], arguments[-1]
    y, p = allocate_forward(*_of_forward(arguments))
    call = _made(ForwardCall, (*fields, base, y, p))
    registry.pick(call, backend).forward(call)
    return y, p


def low_rank_update(y: Tensor, x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    """y + the low-rank terms, and P. The arguments are those of `dash_linear` but for weight and bias."""
    return dash_linear(x, None, None, *arguments, base=y)


def dash_linear_backward(*arguments: Any) -> Gradients:
    """The arguments are the fields of BackwardCall before `dx`, which gradients are needed, and the backend."""
    fields, needs, backend = arguments[:-2], arguments[-2], arguments[-1]
    grads = allocate_backward(needs, *_of_backward(arguments))
    wanted = grads if all(needs) else [g if n else None for g, n in zip(grads, needs, strict=True)]
    call = _made(BackwardCall, (*fields, *wanted))
    registry.pick(call, backend).backward(call)
    return grads


def project(x: Tensor, lora_a: Tensor, lora_b: Tensor, dash_u: Tensor | None, *arguments: Any) -> Tensor:
    """P, bit for bit that of `dash_linear`: it is the P of a layer without output features."""
    nothing = x.new_empty(x.shape[0], 0)
    return low_rank_update(nothing, x, lora_a, lora_b[:0], None if dash_u is None else dash_u[:0], *arguments)[1]


def dash_linear_after(p: Tensor, *arguments: Any) -> Tensor:
    """y of `dash_linear`, where P is known. The kernels make their own P, a matter of R / N of their work."""
    return dash_linear(*arguments)[0]


def low_rank_update_after(p: Tensor, *arguments: Any) -> Tensor:
    """The sum of `low_rank_update`, where P is known."""
    return low_rank_update(*arguments)[0]


def allocate_group_forward(
    x: Tensor, lora_a: list[Tensor], lora_b: list[Tensor], dash_sigma: list[Tensor]
) -> tuple[list[Tensor], Tensor]:
    """y (M, N) of every member in the dtype of x, and P (M, R) of all in the accumulator's."""
    m, width = x.shape[0], sum(t.shape[0] for t in (*lora_a, *dash_sigma))
    return [x.new_empty(m, b.shape[0]) for b in lora_b], x.new_empty(m, width, dtype=accumulator(x.dtype))


def allocate_group_backward(
    needs: list[bool], x: Tensor, lora_a: list[Tensor], lora_b: list[Tensor], dash_sigma: list[Tensor]
) -> GroupGradients:
    """dx and the members' da, db_lora, dsigma, dbias, as `allocate_backward`; needs: dx, then those of a list each."""
    count = len(lora_a)
    members = [
        allocate_backward([False, *(needs[1 + i :: count])], x, lora_a[i], lora_b[i], dash_sigma[i])
        for i in range(count)
    ]
    dx = x.new_empty(*x.shape) if needs[0] else x.new_empty(0)
    da, db_lora, dsigma, dbias = (list(grads) for grads in list(zip(*members, strict=True))[1:])
    return dx, da, db_lora, dsigma, dbias


def dash_linear_group(*arguments: Any) -> tuple[list[Tensor], Tensor]:
    """Every y, and P. The arguments are the fields of GroupForwardCall before `y`, and the backend."""
    fields, backend = arguments[:-1], arguments[-1]
    y, p = allocate_group_forward(*_of_group(arguments))
    registry.run_group(_made(GroupForwardCall, (*fields, y, p)), backend)
    return y, p


def dash_linear_group_backward(*arguments: Any) -> GroupGradients:
    """The arguments are the fields of GroupBackwardCall before `dx`, which gradients are needed, and the backend."""
    fields, needs, backend = arguments[:-2], arguments[-2], arguments[-1]
    grads = allocate_group_backward(needs, *_of_group_backward(arguments))
    wanted: list[Any] = [grads[0] if needs[0] else None]
    for i, kind in enumerate(grads[1:]):
        wanted.append([g if n else None for g, n in zip(kind, needs[1 + i * len(kind) :], strict=False)])
    registry.run_group(_made(GroupBackwardCall, (*fields, *wanted)), backend)
    return grads


def _fake_group(*arguments: Any) -> tuple[list[Tensor], Tensor]:
    return allocate_group_forward(*_of_group(arguments))


def _fake_group_backward(*arguments: Any) -> GroupGradients:
    return allocate_group_backward(arguments[-2], *_of_group_backward(arguments))


def _fake_dash_linear(*arguments: Any) -> tuple[Tensor, Tensor]:
    return allocate_forward(*_of_forward(arguments))


def _fake_low_rank_update(y: Tensor, x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    return _fake_dash_linear(x, None, None, *arguments)


def _fake_backward(*arguments: Any) -> Gradients:
    return allocate_backward(arguments[-2], *_of_backward(arguments))


def _checked(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """What the dispatcher calls: anyone may call an operator, with any seed. Our own calls take one of `draw_seed` or `window`,
    and spare the third of a microsecond that looking at it takes in each pass."""
    names = [argument.name for argument in getattr(torch.ops.loradash, name).default._schema.arguments]
    seed, x = names.index("seed"), names.index("x")

    def call(*arguments: Any) -> Any:
        check_seed(arguments[seed], arguments[x])
        return function(*arguments)

    return call


for _name, _real, _fake in (
    ("dash_linear", dash_linear, _fake_dash_linear),
    ("low_rank_update", low_rank_update, _fake_low_rank_update),
    ("dash_linear_backward", dash_linear_backward, _fake_backward),
    ("project", project, lambda x, *arguments: _fake_low_rank_update(x, x, *arguments)[1]),
    ("dash_linear_after", dash_linear_after, lambda p, *arguments: _fake_dash_linear(*arguments)[0]),
    ("low_rank_update_after", low_rank_update_after, lambda p, *arguments: _fake_low_rank_update(*arguments)[0]),
    ("dash_linear_group", dash_linear_group, _fake_group),
    ("dash_linear_group_backward", dash_linear_group_backward, _fake_group_backward),
):
    LIBRARY.impl(_name, _checked(_name, _real), "CompositeExplicitAutograd")
    torch.library.register_fake(f"loradash::{_name}", _checked(_name, _fake), lib=LIBRARY)

# The compiled operators have no gradients of their own. Past autograd's key the dispatcher meets the keys of negated and of
# zero tensors, which it makes ordinary ones before it calls the kernel.
COMPILED = [torch.library.Library(f"loradash_{device}", "IMPL") for device in ("cpu", "cuda")]
if extension.is_compiled():
    for _library, _key in zip(COMPILED, ("AutogradCPU", "AutogradCUDA"), strict=True):
        # A group has kernels of its own on the CPU alone.
        own = ("group_forward", "group_backward") if _key == "AutogradCPU" else ()
        for _name in ("forward", "backward", *own):
            _library.impl(_name, torch.library.fallthrough_kernel, _key)
