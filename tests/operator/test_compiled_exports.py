"""Layers in programs of torch.export: with the operator, with PyTorch's own operations, and merged."""

from __future__ import annotations

import io

import loradash
import pytest
import torch
from torch import nn
from torch.export import Dim, export

from loradash_kernels import operator_decompositions
from loradash_kernels.random import draw_seed
from loradash_kernels.testing import make_case

WIDTH, INNER = 8, 16


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(WIDTH, INNER), nn.Linear(INNER, WIDTH)
        loradash.apply_dash(self, loradash.DashConfig(r=2, directions=3, dropout=0.4, target_modules=["up", "down"]))
        for layer in loradash.dash_layers(self).values():
            nn.init.normal_(layer.lora_b)

    def forward(self, x):
        return x + self.down(nn.functional.gelu(self.up(x)))


def launched(block):
    for layer in loradash.dash_layers(block).values():
        for tensor in (layer.dash_u, layer.dash_vt, layer.dash_sigma):
            nn.init.normal_(tensor)
    return block


PHASES = {"before launch": lambda block: block, "after launch": launched}


def exported(block, strict=False):
    """A program for any batch and length."""
    dynamic = {"x": {0: Dim("batch"), 1: Dim("length")}}
    return export(block, (torch.randn(2, 6, WIDTH),), dynamic_shapes=dynamic, strict=strict)


def reloaded(program):
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    return torch.export.load(file)


def operators(program):
    return {str(node.target) for node in program.graph.nodes if node.op == "call_function"}


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("phase", PHASES)
@torch.no_grad()
def test_programs(phase, strict):
    block, x = PHASES[phase](Block().eval()), torch.randn(3, 5, WIDTH)
    expected = block(x)
    program = reloaded(exported(block, strict))
    assert "loradash.dash_linear.default" in operators(program)
    torch.testing.assert_close(program.module()(x), expected, rtol=0, atol=0)
    decomposed = reloaded(program.run_decompositions(operator_decompositions()))
    assert not any("loradash" in name for name in operators(decomposed))
    torch.testing.assert_close(decomposed.module()(x), expected)
    loradash.merge(block)
    merged = reloaded(exported(block, strict))
    assert not any("loradash" in name for name in operators(merged))
    torch.testing.assert_close(merged.module()(x), expected, rtol=1e-4, atol=1e-4)


def test_decomposed_training_draws_the_same_mask():
    block, x = launched(Block()), torch.randn(3, 5, WIDTH)
    program = exported(block).run_decompositions(operator_decompositions()).module()
    results = []
    for call in (block, program):
        torch.manual_seed(3)
        results.append(call(x))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(results[0], block.eval()(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dropout", [0, 20000])
def test_decompositions_are_the_operators(dtype, dropout):
    t = make_case(5, 16, 6, 2, 3, dtype).tensors
    adapters = [t[name] for name in ("lora_a", "lora_b", "dash_u", "dash_vt", "dash_sigma")]
    y, seed = torch.randn(5, 6, dtype=dtype), draw_seed() if dropout else None
    base = [t["weight"], t["bias"]]
    # A member without bias and directions beside it.
    a, b, u, vt, sigma = adapters
    second = [t["weight"], t["bias"][:0], a, b, u[:, :0], vt[:0], sigma[:0]]
    calls = {
        "dash_linear": (t["x"], *base, *adapters, seed, 2.0, dropout, None),
        "low_rank_update": (y, t["x"], *adapters, seed, 2.0, dropout, None),
        "dash_linear_group": (
            t["x"],
            *([one, other] for one, other in zip((*base, *adapters), second, strict=True)),
            *(seed, [2.0, 1.0], dropout, None),
        ),
    }
    # A bfloat16 sum of terms that cancel is as far off as its largest term is rounded.
    tolerances = {"rtol": 2e-2, "atol": 5e-2} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-5}
    for op, formula in operator_decompositions().items():
        arguments = calls.pop(op._schema.name.split("::")[1])
        torch.testing.assert_close(formula(*arguments), op(*arguments), **tolerances)
    assert not calls
