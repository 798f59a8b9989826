"""A call has the fields of the operators that take it, by name, in order, and absent where they may be."""

from __future__ import annotations

import typing

import pytest
import torch

from loradash_kernels.backends import extension
from loradash_kernels.calls import BackwardCall, ForwardCall

CALLS = {"forward": ForwardCall, "backward": BackwardCall}
PUBLIC = torch.ops.loradash


def arguments(operator):
    """(name, type) of the arguments of a schema."""
    return [(a.name, str(a.type)) for a in operator.default._schema.arguments]


def fields(call, until=None):
    """(name, type) of the fields before `until`, in the words of a schema."""
    words = {torch.Tensor: "Tensor", torch.Tensor | None: "Optional[Tensor]", float: "float", int: "int"}
    found = [(name, words[kind]) for name, kind in typing.get_type_hints(call).items()]
    names = [name for name, _ in found]
    return found[: names.index(until)] if until else found


@pytest.mark.skipif(not extension.is_compiled(), reason=str(extension.missing_reason))
@pytest.mark.parametrize("pass_", CALLS)
def test_compiled_operators(pass_):
    assert fields(CALLS[pass_]) == arguments(getattr(torch.ops.loradash_cpu, pass_))
    if extension.compiled().cuda_architectures is not None:
        assert [*fields(CALLS[pass_]), ("tile", "str")] == arguments(getattr(torch.ops.loradash_cuda, pass_))


def test_public_operators():
    """`loradash::dash_linear` always has a weight; an update has y in place of weight and bias."""
    backend = ("backend", "Optional[str]")
    known = dict(fields(ForwardCall, "base"))
    assert arguments(PUBLIC.dash_linear) == [*(known | {"weight": "Tensor"}).items(), backend]
    del known["weight"], known["bias"]
    assert arguments(PUBLIC.low_rank_update) == [("y", "Tensor"), *known.items(), backend]
    given = fields(BackwardCall, "dx")
    assert arguments(PUBLIC.dash_linear_backward) == [*given, ("needs", "List[bool]"), backend]


def test_gradients_are_named_as_the_operators_results():
    results = [r.name for r in PUBLIC.dash_linear_backward.default._schema.returns]
    assert results == list(BackwardCall._fields[-len(results) :])


def test_passes():
    assert all(call._make([None] * len(call._fields)).pass_ == pass_ for pass_, call in CALLS.items())
