"""dash_experts: the error rule for every expert's rows, one mask for all of them, shapes, errors, registration, compile."""

from __future__ import annotations

import pytest
import torch
import torch._dynamo.testing
from support.devices import backends_on, plain_dtype

from loradash_kernels import dash_experts, expert_offsets
from loradash_kernels.random import draw_seed, dropout_mask, dropout_threshold, row_windows, window
from loradash_kernels.testing import GRADIENTS, Case, check_error_rule, make_case

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NAMES = ("x", "weight", "bias", "lora_a", "lora_b", "dash_u", "dash_vt", "dash_sigma")
# Rows an expert: idle ones at either end and between, one row, more than a block; one expert; all rows at one; none at all.
ROUTES = [(0, 5, 0, 1, 70, 0), (33,), (0, 64, 0), (0, 0), (4, 4, 4)]


def problem(counts, k=24, n=40, r=4, s=3, dtype=torch.float32, **options):
    """One case an expert, and the tensors of the operator."""
    cases = [
        make_case(m, k, n, r, s, dtype, adapter_dtype=torch.float32, seed=e, **options) for e, m in enumerate(counts)
    ]
    tensors = {}
    for name in NAMES:
        parts = [case.tensors[name] for case in cases]
        join = torch.cat if name == "x" else torch.stack
        tensors[name] = None if parts[0] is None else join(parts)
    device = cases[0].device
    return cases, tensors, torch.tensor(counts, device=device).cumsum(0), torch.cat([case.dy for case in cases])


def run(tensors, offsets, dy, case: Case, transposed=False, backend=None):
    """Output and gradients."""
    leaves = {n: None if t is None else t.clone().requires_grad_(n in GRADIENTS) for n, t in tensors.items()}
    torch.manual_seed(7)
    x, weight, bias = (leaves.pop(name) for name in NAMES[:3])
    stored = weight.mT.contiguous().mT if transposed else weight
    options = {"scaling": case.scaling, "dropout_p": case.dropout_p, "backend": backend}
    y = dash_experts(x, stored, offsets, bias, **leaves, **options)
    y.backward(dy)
    grads = {n: t.grad for n, t in {"x": x, "bias": bias, **leaves}.items() if n in GRADIENTS and t is not None}
    return {"y": y.detach(), **grads}


def check(counts, cases, found):
    """Every expert with rows by the error rule, under its rows of the mask; idle ones have zeros for gradients."""
    case = cases[0]
    torch.manual_seed(7)
    threshold, k = dropout_threshold(case.dropout_p), case.x.shape[1]
    device = case.device
    keep = torch.ones(sum(counts), k, dtype=torch.bool, device=device)
    if threshold:
        keep = dropout_mask(draw_seed(device), threshold, sum(counts), k)
    start = 0
    for e, (one, m) in enumerate(zip(cases, counts, strict=True)):
        rows = slice(start, start + m)
        part = {name: t[rows] if name in ("y", "x") else t[e] for name, t in found.items()}
        if m:
            check_error_rule(one, part, keep[rows])
        else:
            assert not any(t.any() for t in part.values())
        start += m


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("counts", ROUTES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_error_rule(device, counts, dtype, dropout_p):
    cases, tensors, offsets, dy = problem(counts, dtype=dtype, dropout_p=dropout_p, device=device)
    check(counts, cases, run(tensors, offsets, dy, cases[0]))


def test_every_backend(device):
    counts = (0, 5, 70)
    for backend in backends_on(device):
        options = {"dtype": plain_dtype(backend), "dropout_p": 0.2, "device": device}
        cases, tensors, offsets, dy = problem(counts, **options)
        check(counts, cases, run(tensors, offsets, dy, cases[0], backend=backend))


@pytest.mark.parametrize(
    "options",
    [{"s": 0}, {"r": 0}, {"r": 0, "s": 0}, {"bias": False}, {"k": 7, "n": 9}, {"k": 0}, {"dtype": torch.float64}],
)
def test_odd_problems(device, options):
    counts = (6, 0, 40)
    cases, tensors, offsets, dy = problem(counts, dropout_p=0.2, device=device, **options)
    check(counts, cases, run(tensors, offsets.int(), dy, cases[0], transposed=True))


def test_only_what_is_needed(device):
    """Frozen adapters cost no gradient, and those that are left do not change."""
    counts = (6, 0, 40)
    cases, tensors, offsets, dy = problem(counts, device=device)
    whole = run(tensors, offsets, dy, cases[0])
    sigma = tensors["dash_sigma"].clone().requires_grad_()
    x, weight, bias = (tensors[name] for name in NAMES[:3])
    rest = {name: tensors[name] for name in NAMES[3:7]}
    dash_experts(x, weight, offsets, bias, **rest, dash_sigma=sigma, scaling=cases[0].scaling).backward(dy)
    torch.testing.assert_close(sigma.grad, whole["dash_sigma"])


def test_row_windows():
    seed = torch.tensor([3, 4])
    for whole in (seed, window(seed, 5, 16)):
        for row, found in zip((0, 2, 9), row_windows(whole, (0, 2, 9)), strict=True):
            assert torch.equal(found, window(whole, row, 0))
    with pytest.raises(ValueError, match="row"):
        row_windows(seed, (0, 2**32))


def test_expert_offsets(device):
    index = torch.tensor([3, 1, 3, 0, 1, 3], device=device)
    order, offsets = expert_offsets(index, 5)
    assert order.tolist() == [3, 1, 4, 0, 2, 5] and offsets.tolist() == [1, 3, 3, 6, 6]


def test_what_is_refused(device):
    _, tensors, offsets, _ = problem((3, 5), device=device)
    x, weight, bias = (tensors[name] for name in NAMES[:3])
    adapters = {name: tensors[name] for name in NAMES[3:]}

    def refused(match, error=ValueError, x=x, weight=weight, offsets=offsets, bias=bias, **changed):
        with pytest.raises(error, match=match):
            dash_experts(x, weight, offsets, bias, **{**adapters, **changed})

    refused("offsets must ascend to the 8 rows", offsets=offsets + 1)
    refused("offsets must ascend", offsets=offsets.flip(0))
    refused("offsets has shape", offsets=offsets[:1])
    refused("int32 or int64", offsets=offsets.float())
    refused("at least one expert", weight=weight[:0])
    refused("weight has shape", weight=weight[0])
    refused("lora_b has shape .*of 2 experts", lora_b=adapters["lora_b"][:1])
    refused("bias has shape", bias=bias[0])
    refused("rows sorted by expert", x=x[None])
    refused("lora_a has shape", lora_a=adapters["lora_a"][..., :3])
    refused("go together", dash_u=None)
    refused("weight requires grad", weight=weight.clone().requires_grad_())
    refused("one dtype", x=x.double(), weight=weight)
    refused("dropout_p must be", dropout_p=1.5)
    refused("backend must be one of", backend="nothing")
    with pytest.raises(RuntimeError, match=r"torch\.func"):
        torch.func.grad(lambda x: dash_experts(x, weight, offsets, bias, **adapters).sum())(x)
    leaf = x.clone().requires_grad_()
    (dx,) = torch.autograd.grad(
        dash_experts(leaf, weight, offsets, bias, **adapters).square().sum(), leaf, create_graph=True
    )
    with pytest.raises(RuntimeError, match="second derivatives"):
        dx.sum().backward()


def test_compiled_once_for_every_route():
    """One graph; other counts, and other numbers of rows, are no reason to compile again."""
    torch._dynamo.reset()
    _, tensors, _, _ = problem((6, 0, 10))
    adapters = {name: tensors[name].clone().requires_grad_(name in GRADIENTS) for name in NAMES[3:]}
    graphs = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    def step(x, offsets):
        return dash_experts(x, tensors["weight"], offsets, tensors["bias"], **adapters, scaling=2.0).tanh().sum()

    compiled, made = torch.compile(step, backend=graphs, fullgraph=True, dynamic=True), []
    for counts in ((6, 0, 10), (0, 1, 15), (30, 4, 0)):
        x, offsets = torch.randn(sum(counts), 24), torch.tensor(counts).cumsum(0)
        leaves = [t for t in adapters.values() if t.requires_grad]
        ours, eager = compiled(x, offsets), step(x, offsets)
        torch.testing.assert_close(ours, eager)
        for got, wanted in zip(torch.autograd.grad(ours, leaves), torch.autograd.grad(eager, leaves), strict=True):
            torch.testing.assert_close(got, wanted)
        made.append(graphs.frame_count)
    assert made[0] == made[-1], "other counts compiled again"


def test_flops_are_those_of_one_layer():
    from torch.utils.flop_counter import FlopCounterMode

    from loradash_kernels import dash_linear

    _, tensors, offsets, dy = problem((3, 0, 5))
    leaves = {n: t.clone().requires_grad_(n in GRADIENTS) for n, t in tensors.items()}
    with FlopCounterMode(display=False) as counted:
        dash_experts(leaves.pop("x"), leaves.pop("weight"), offsets, leaves.pop("bias"), **leaves).backward(dy)
    one = {n: (t if n == "x" else t[0]).clone().requires_grad_(n in GRADIENTS) for n, t in tensors.items()}
    with FlopCounterMode(display=False) as wanted:
        dash_linear(one.pop("x"), one.pop("weight"), one.pop("bias"), **one).backward(dy)
    assert counted.get_total_flops() == wanted.get_total_flops() > 0
