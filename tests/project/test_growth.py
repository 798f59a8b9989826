"""CONTRIBUTING's lists of what a new operator, backend and front end touch: a toy of each, made of those files alone.

The toy backend stands in tests/backends/test_registry.py.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from loradash_kernels import low_rank_update

ROOT = Path(__file__).parents[2]
PATHS = re.findall(r"`([\w./-]+(?:/|\.\w+))`", (ROOT / "CONTRIBUTING.md").read_text())


@pytest.mark.parametrize("path", sorted({path for path in PATHS if "/" in path}))
def test_the_lists_name_what_is_there(path):
    assert (ROOT / path).exists()


OPERATOR = """
import torch
from loradash_kernels import autograd, functional, ops
from loradash_kernels.backends import registry
from loradash_kernels.calls import ForwardCall
from loradash_kernels.testing import make_case

# The low-rank terms without a base. ops.py: schema, implementation, fake, registration.
ops.LIBRARY.define(f"toy(Tensor x, {ops._ADAPTERS}, {ops._OPTIONS}, str? backend) -> (Tensor out, Tensor p)")

def toy(x, *arguments):
    inputs = (x, None, None, *arguments)
    out, p = ops.allocate_forward(*ops._of_forward(inputs))
    call = ForwardCall._make((*inputs[:-1], torch.zeros_like(out), out, p))
    registry.pick(call, inputs[-1]).forward(call)
    return out, p

def fake(x, *arguments):
    return ops.allocate_forward(*ops._of_forward((x, None, None, *arguments)))

ops.LIBRARY.impl("toy", toy, "CompositeExplicitAutograd")
torch.library.register_fake("loradash::toy", fake, lib=ops.LIBRARY)
# autograd.py: the pair of functions, by the names of the arguments.
operator = autograd.Operator(torch.ops.loradash.toy, toy)

t = make_case(5, 12, 7, 3, 2).tensors
leaves = [t[n].requires_grad_() for n in ("x", "lora_a", "lora_b", "dash_sigma")]
x, a, b, sigma = leaves
arguments = (x, a, b, t["dash_u"], t["dash_vt"], sigma, None, 2.0, 0, None)
expected = 2.0 * x @ a.T @ b.T + (x @ t["dash_vt"].T * sigma) @ t["dash_u"].T
wanted = torch.autograd.grad(expected.square().sum(), leaves)
for call in (torch.ops.loradash.toy, operator.function.apply, torch.compile(torch.ops.loradash.toy, backend="aot_eager")):
    out = call(*arguments)[0]
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(torch.autograd.grad(out.square().sum(), leaves), wanted)
torch.testing.assert_close(functional._call(operator, arguments), expected)
torch.library.opcheck(torch.ops.loradash.toy, arguments)
"""


def test_a_toy_operator():
    """Schema, allocator, fake and gradients of a third operator take what the other two are made of."""
    done = subprocess.run([sys.executable, "-c", OPERATOR], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


class TheirLora(nn.Module):
    """A LoRA layer as a front end may have one."""

    def __init__(self, base: nn.Linear, r: int) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down, self.up = nn.Linear(base.in_features, r, bias=False), nn.Linear(r, base.out_features, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + 2.0 * self.up(self.down(x))


def accelerate(model: nn.Module) -> nn.Module:
    """What a module of integrations/ does: other people's layers compute through the operator, with their parameters."""

    def forward(self: TheirLora, x: torch.Tensor) -> torch.Tensor:
        return low_rank_update(self.base(x), x, lora_a=self.down.weight, lora_b=self.up.weight, scaling=2.0)

    for layer in model.modules():
        if isinstance(layer, TheirLora):
            layer.forward = forward.__get__(layer)
    return model


def test_a_toy_front_end():
    model, x = (
        nn.Sequential(TheirLora(nn.Linear(12, 20), 3), nn.Tanh(), TheirLora(nn.Linear(20, 4), 2)),
        torch.randn(5, 12),
    )
    parameters = [p for p in model.parameters() if p.requires_grad]
    expected = model(x)
    wanted = torch.autograd.grad(expected.square().sum(), parameters)
    y = accelerate(model)(x)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(torch.autograd.grad(y.square().sum(), parameters), wanted)
