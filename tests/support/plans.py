"""Plans of Triton launches, made anew and prepared, and what is the same about them. Needs Triton."""

from __future__ import annotations

from dataclasses import fields

import torch

from loradash_kernels.backends.triton import prepared, tiles
from loradash_kernels.backends.triton.plan.backward import plan_backward
from loradash_kernels.backends.triton.plan.forward import plan_forward
from loradash_kernels.backends.triton.problem import KernelLaunch, Problem
from loradash_kernels.testing import make_case

from .calls import base_product, calls, drawn_seed, outputs


class Compiled:
    """Stands for a compiled kernel: keeps what its launcher is given."""

    function, packed_metadata = "function", "metadata"

    def __init__(self, name, seen):
        self.run = lambda *arguments: seen.append((name, *arguments))


def plan_of(call, target, strategy, memory=None):
    problem = Problem(call, tiles.TARGETS[target], memory=memory)
    plan = plan_forward if call.pass_ == "forward" else plan_backward
    return problem, plan(problem, strategy)


def prepare(call, target="sm_80", strategy=None):
    return prepared.PreparedPlan(*plan_of(prepared.without_memory(call), target, strategy, "meta"))


def both_calls(*size, dtype=torch.bfloat16, dropout_p=0.1, bias=True, base=True, layout=None):
    case = make_case(*size, dtype, adapter_dtype=torch.float32, dropout_p=dropout_p, bias=bias)
    if layout is not None:
        layout(case)
    return calls(case, outputs(case, base), drawn_seed(case), None if base else base_product(case))


def same_tensor(one, two, given):
    """The same memory where it is the call's, else memory of the same shape, order and dtype."""
    same = (one.shape, one.stride(), one.dtype) == (two.shape, two.stride(), two.dtype)
    ours = {t.data_ptr() for t in given if isinstance(t, torch.Tensor) and t.numel()}
    return same and (one.data_ptr() == two.data_ptr() or not {one.data_ptr(), two.data_ptr()} & ours)


def same_value(one, two, given):
    if isinstance(one, torch.Tensor):
        return same_tensor(one, two, given)
    if hasattr(one, "block_shape"):
        facts = [(d.shape, d.strides, d.block_shape) for d in (one, two)]
        return facts[0] == facts[1] and same_tensor(one.base, two.base, given)
    return one == two


def check_same_plan(one, two, given):
    assert len(one) == len(two)
    for a, b in zip(one, two, strict=True):
        assert type(a) is type(b)
        if not isinstance(a, KernelLaunch):
            parts = [[getattr(step, field.name) for field in fields(step)] for step in (a, b)]
            assert all(same_value(x, y, given) for x, y in zip(*parts, strict=True))
            continue
        facts = [(c.kernel, c.grid, c.constants, c.num_warps, c.num_stages, list(c.args)) for c in (a, b)]
        assert facts[0] == facts[1]
        for name in a.args:
            assert same_value(a.args[name], b.args[name], given), (a.kernel.__name__, name)


def workspace_of(plan, given):
    """First and last byte of every tensor of a plan that is not the call's."""
    ours = {id(t) for t in given}
    found = {}
    for launch in plan:
        for value in launch.args.values() if isinstance(launch, KernelLaunch) else ():
            t = getattr(value, "base", value) if hasattr(value, "block_shape") else value
            if isinstance(t, torch.Tensor) and id(t) not in ours and t.numel():
                span = sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True)) + 1
                found[t.data_ptr()] = t.data_ptr() + span * t.element_size()
    return sorted(found.items())
