"""What Inductor makes of the operator's neighbours: as many kernels as around nn.Linear, and no copy of x or y."""

from __future__ import annotations

import re

import loradash
import pytest
import torch
from torch import nn
from torch._inductor import metrics
from torch._inductor.utils import run_and_get_code

import benchmarks.compiled.counts as compiler

WIDTH, INNER, HEADS = 16, 32, 2
LAYERS = {"q": (WIDTH, WIDTH), "v": (WIDTH, WIDTH), "o": (WIDTH, WIDTH), "up": (WIDTH, INNER), "down": (INNER, WIDTH)}

pytestmark = pytest.mark.slow


class Block(nn.Module):
    """Attention and MLP with their norms: x comes from a norm, from attention's transposed output and from GELU."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        for name, (k, n) in LAYERS.items():
            setattr(self, name, nn.Linear(k, n))

    def forward(self, x):
        rows, tokens, _ = x.shape
        h = self.first(x)
        q, v = (layer(h).view(rows, tokens, HEADS, -1).transpose(1, 2) for layer in (self.q, self.v))
        mixed = torch.softmax(q @ q.transpose(-1, -2), -1) @ v
        x = x + self.o(mixed.transpose(1, 2).reshape(x.shape))
        return x + self.down(nn.functional.gelu(self.up(self.second(x))))


def adapted():
    block = loradash.apply_dash(Block(), loradash.DashConfig(r=2, directions=2, dropout=0.3, target_modules=[*LAYERS]))
    for layer in loradash.dash_layers(block).values():
        nn.init.normal_(layer.lora_b, std=0.1)
    return block


def plain():
    block = Block()
    for name in LAYERS:
        getattr(block, name).requires_grad_(False)
    return block


SEEDS = (5, 6, 7)


def step(block, call, seed=SEEDS[0], rows=2, tokens=8):
    """Output and gradients, that of x among them; x is the same for every seed."""
    block.zero_grad()
    torch.manual_seed(seed)
    x = torch.randn(rows, tokens, WIDTH, generator=torch.Generator().manual_seed(1)).requires_grad_()
    y = call(x)
    y.square().sum().backward()
    return [y.detach(), x.grad, *(p.grad for p in block.parameters() if p.grad is not None)]


def calls(code, *names):
    """How many calls of these a generated program makes."""
    body = code[code.index("def call(") :]
    return sum(len(re.findall(rf"^ .*\b{name}\(", body, re.MULTILINE)) for name in names)


@pytest.fixture(scope="module")
def made():
    """For each kind of block: kernels, and code of the two passes. The adapted one's results are held to eager ones."""
    found = {}
    for kind, make in (("plain", plain), ("adapted", adapted)):
        with compiler.fresh_compiler():
            block = make()
            metrics.reset()
            call = torch.compile(block, fullgraph=True)
            results, code = run_and_get_code(lambda block=block, call=call: step(block, call))
            found[kind] = metrics.generated_kernel_count, code
            if kind == "adapted":
                found["compiled"] = [results, *(step(block, call, seed) for seed in SEEDS[1:])]
                found["eager"] = [step(block, block, seed) for seed in SEEDS]
    return found


def test_results_and_masks_are_those_of_eager_calls(made):
    """Every seed draws another mask, compiled the one that it draws eager."""
    torch.testing.assert_close(made["compiled"], made["eager"], rtol=1e-4, atol=1e-4)
    first, *others = (y for y, *_ in made["eager"])
    assert not any(torch.allclose(y, first, rtol=1e-2, atol=1e-2) for y in others)


def test_neighbours_stay_fused(made):
    """Every layer is one call a pass where nn.Linear's is one; between the layers stand as many kernels, and none more that
    copies: attention's own copies are there either way."""
    (our_kernels, ours), (their_kernels, theirs) = made["adapted"], made["plain"]
    assert our_kernels <= their_kernels
    for pass_, op in enumerate(("dash_linear", "dash_linear_backward")):
        assert calls(ours[pass_], rf"torch\.ops\.loradash\.{op}\.default") == len(LAYERS)
        assert calls(theirs[pass_], r"extern_kernels\.addmm", r"extern_kernels\.mm") == len(LAYERS)
        for kernels in (r"cpp_fused_\w+", r"cpp_fused_\w*clone\w*"):
            assert calls(ours[pass_], kernels) == calls(theirs[pass_], kernels)
