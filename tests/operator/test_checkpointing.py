"""Activation checkpoints that keep P: gradients, masks, and what is computed again."""

from __future__ import annotations

import loradash
import pytest
import torch
from support.devices import plain_dtype
from torch import nn
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop
from torch.utils.flop_counter import FlopCounterMode

import benchmarks.compiled.counts as compiler
from loradash_kernels import checkpointing, dash_experts, dash_linear, keep_projections
from loradash_kernels.rows import NO_ADAPTER, Adapter, dash_linear_rows, group_rows
from loradash_kernels.testing import make_case

WIDTH, INNER, ROWS, R, S = 16, 24, 6, 3, 2
ADAPTERS = ("lora_a", "lora_b", "dash_u", "dash_vt", "dash_sigma")


class Block(nn.Module):
    """A block that ends in an adapted layer, as transformers' blocks do."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, INNER), nn.Linear(INNER, WIDTH)

    def forward(self, x):
        return x + self.down(nn.functional.gelu(self.up(x)))


class Grouped(nn.Module):
    """A block that ends in layers computed together."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.gate = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return self.up(x) + self.gate(x)


class Network(nn.Module):
    def __init__(self, kind=Block, **options):
        super().__init__()
        torch.manual_seed(0)
        self.blocks, self.options = nn.ModuleList([kind(), kind()]), options
        config = loradash.DashConfig(r=R, directions=S, dropout=0.4, target_modules=["up", "down", "gate"])
        loradash.apply_dash(self, config)
        for layer in loradash.dash_layers(self).values():
            for parameter in (layer.lora_b, layer.dash_sigma, layer.dash_u, layer.dash_vt):
                nn.init.normal_(parameter, std=0.3)
        if kind is Grouped:
            loradash.group_projections(self, [("up", "gate")])

    def forward(self, x):
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False, **self.options) if self.options else block(x)
        return x


def step(network, call=None):
    """Output and gradients of a step whose masks follow from a seed."""
    network.zero_grad()
    torch.manual_seed(7)
    x = torch.linspace(-1, 1, ROWS * WIDTH).view(ROWS, WIDTH)
    y = (network if call is None else call)(x)
    y.square().sum().backward()
    return [y.detach(), *(p.grad for p in network.parameters() if p.requires_grad)]


KEEPING = {"context_fn": keep_projections}


@pytest.fixture(scope="module")
def expected():
    return step(Network())


@pytest.mark.parametrize("options", [KEEPING, {**KEEPING, "preserve_rng_state": False}])
@pytest.mark.parametrize("kind", [Block, Grouped])
def test_gradients_and_masks_are_those_without(kind, options):
    """Where the generator is not put back, the seed that P was made with serves the recomputation too."""
    torch.testing.assert_close(step(Network(kind, **options)), step(Network(kind)), rtol=0, atol=0)


def test_experts_and_rows_of_several_adapters():
    """What else calls a layer's operator keeps its P as well."""
    torch.manual_seed(0)
    experts, tokens = 3, 8
    shapes = {
        "lora_a": (R, WIDTH),
        "lora_b": (WIDTH, R),
        "dash_u": (WIDTH, S),
        "dash_vt": (S, WIDTH),
        "dash_sigma": (S,),
    }
    t = {name: torch.randn(experts, *shape) for name, shape in shapes.items()}
    weight, x = torch.randn(experts, WIDTH, WIDTH), torch.randn(tokens, WIDTH, requires_grad=True)
    t["lora_a"].requires_grad_()
    offsets, rows = torch.tensor([3, 3, tokens]), group_rows([0, 1, 0, NO_ADAPTER, 2, 2, 1, 0])
    adapters = [Adapter(*(t[name][i] for name in shapes), dropout_p=0.4) for i in range(experts)]

    def layers(x):
        y = dash_experts(x, weight, offsets, **t, dropout_p=0.4)
        return dash_linear_rows(y, weight[0], adapters=adapters, rows=rows).square()

    found = []
    for options in ({}, {**KEEPING, "preserve_rng_state": False}):
        torch.manual_seed(7)
        y = checkpoint(layers, x, use_reentrant=False, **options) if options else layers(x)
        found.append([y, *torch.autograd.grad(y.sum(), (x, t["lora_a"]))])
    torch.testing.assert_close(*found, rtol=0, atol=0)


def flops(options, kind=Block):
    network = Network(kind, **options)
    with FlopCounterMode(display=False) as counter:
        step(network)
    return counter.get_total_flops()


def test_the_last_layer_of_a_region_is_not_computed_again():
    down = 2 * ROWS * (INNER * WIDTH + (INNER + WIDTH) * (R + S))
    plain = {"determinism_check": "default"}
    assert flops(plain) - flops(KEEPING) == 2 * down
    assert flops(plain) > flops({}) + 2 * down
    both = 2 * 2 * ROWS * (WIDTH * WIDTH + 2 * WIDTH * (R + S))
    assert flops(plain, Grouped) - flops(KEEPING, Grouped) == 2 * both == flops(plain, Grouped) - flops({}, Grouped)


def test_what_is_kept(expected):
    """P of every layer and 16 bytes of seed, between the passes; a retained graph is recomputed once more."""
    regions = []

    def watched():
        regions.append(keep_projections())
        return regions[-1]

    network = Network(context_fn=watched)
    torch.manual_seed(7)
    loss = network(torch.linspace(-1, 1, ROWS * WIDTH).view(ROWS, WIDTH)).square().sum()
    kept = [tensor for forward, _ in regions for pair in forward.kept for tensor in pair]
    assert sum(t.numel() * t.element_size() for t in kept) == 4 * (4 * ROWS * (R + S) + 16)
    parameters = [p for p in network.parameters() if p.requires_grad]
    for _ in range(2):
        found = torch.autograd.grad(loss, parameters, retain_graph=True)
        torch.testing.assert_close(list(found), expected[1:], rtol=0, atol=0)
    assert checkpointing.HERE.region is None


@pytest.mark.parametrize(("ranks", "found"), [((R, R), "none is left"), ((R, 1), r"the one kept is \(6, 5\)")])
def test_a_recomputation_that_calls_other_layers(ranks, found):
    configs = [loradash.DashConfig(r=rank, directions=S) for rank in ranks]
    layers = [loradash.DashLinear(WIDTH, WIDTH, config=config) for config in configs]
    calls = []

    def fickle(x):
        calls.append(1)
        if len(calls) == 1:
            return layers[0](x)
        return layers[1](layers[0](x)) if ranks[0] == ranks[1] else layers[1](x)

    with set_checkpoint_early_stop(False):
        x = torch.ones(ROWS, WIDTH, requires_grad=True)
        y = checkpoint(fickle, x, use_reentrant=False, context_fn=keep_projections)
    with pytest.raises(RuntimeError, match=f"keep_projections has no P .*, {found}"):
        y.sum().backward()


@pytest.mark.slow
def test_compiled(expected):
    """In one graph; the forward graph gives P, the backward graph has no product of the last layers."""
    from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
    from torch._dynamo.backends.common import aot_autograd

    graphs = {}

    def compiler_of(name):
        def compile(graph, inputs):
            graphs[name] = graph.graph
            return make_boxed_func(graph.forward)

        return compile

    backend = aot_autograd(
        fw_compiler=compiler_of("forward"),
        bw_compiler=compiler_of("backward"),
        partition_fn=min_cut_rematerialization_partition,
    )
    network = Network(**KEEPING)
    with compiler.fresh_compiler():
        found = step(network, torch.compile(network, fullgraph=True, backend=backend))
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    names = {name: [str(node.target) for node in graph.nodes] for name, graph in graphs.items()}
    assert [names[name].count("loradash.project.default") for name in graphs] == [4, 0]
    assert [names[name].count("loradash.dash_linear_after.default") for name in graphs] == [4, 2]
    (saved,) = graphs["forward"].find_nodes(op="output")
    shapes = [node.meta["val"].shape for node in saved.args[0] if isinstance(node.meta.get("val"), torch.Tensor)]
    assert shapes.count((ROWS, R + S)) == 4
    assert (ROWS, INNER) not in shapes


@pytest.mark.parametrize("base", ["own", "given"])
def test_the_steps_of_a_layer(backend, device, base):
    """P and then y are bit for bit what the layer gives at once, on every backend."""
    dtype = plain_dtype(backend)
    t = make_case(33, 40, 24, 4, 3, dtype, device=device).tensors
    options = (torch.tensor([5, 6], device=device), 2.0, 20000, backend)
    adapters = [t[name] for name in ADAPTERS]
    ops = torch.ops.loradash
    if base == "own":
        first, whole, after = (t["x"], t["weight"], t["bias"]), ops.dash_linear, ops.dash_linear_after
    else:
        y = nn.functional.linear(t["x"], t["weight"])
        first, whole, after = (y, t["x"]), ops.low_rank_update, ops.low_rank_update_after
    expected = whole(*first, *adapters, *options)
    p = ops.project(t["x"], *adapters, *options)
    torch.testing.assert_close([after(p, *first, *adapters, *options), p], list(expected), rtol=0, atol=0)


def test_eager_calls_outside_are_untouched():
    case = make_case(6, 8, 10, 2, 3)
    t = dict(case.tensors)
    t["lora_a"].requires_grad_()
    y = dash_linear(t.pop("x"), t.pop("weight"), t.pop("bias"), **t)
    assert type(y.grad_fn).__name__ == "DashLinearFunctionBackward"
