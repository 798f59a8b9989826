"""Several layers that share x in one operator: the error rule, mutants, registration, odd and bad input."""

from __future__ import annotations

import pytest
import torch
import torch._dynamo.testing
from support.devices import plain_dtype, refusal
from support.matrix import poisoned
from support.shapes import DTYPES
from torch.utils.flop_counter import FlopCounterMode

from loradash_kernels import GroupMember, dash_linear, dash_linear_group, explain_backend
from loradash_kernels.backends import fused_dropout, reference
from loradash_kernels.testing import GRADIENTS, check_group_error_rule, make_group, run, run_group

# (M, K, members), which are (N, r, s) each.
GROUPS = [
    (1, 1, [(1, 1, 1), (1, 1, 0)]),
    (37, 65, [(50, 4, 3), (33, 5, 0), (7, 0, 2)]),
    (70, 64, [(64, 16, 8), (64, 16, 8), (64, 16, 8)]),
    (33, 40, [(70, 20, 8)]),
]
LEAVES = ("lora_a", "lora_b", "dash_sigma", "bias")


def group(m=12, k=16, members=((20, 4, 3), (8, 2, 0), (10, 3, 2)), dtype=torch.float32, **options):
    return make_group(m, k, members, dtype, **options)


def members_of(cases, grad=False):
    found = []
    for case in cases:
        own = {n: t for n, t in case.tensors.items() if n != "x"}
        if grad:
            own = {n: t if t is None else t.clone().requires_grad_(n in GRADIENTS) for n, t in own.items()}
        found.append(GroupMember(**own, scaling=case.scaling))
    return found


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", GROUPS, ids=str)
def test_error_rule(backend, device, shape, dtype, dropout_p):
    cases = make_group(*shape, dtype, adapter_dtype=torch.float32, dropout_p=dropout_p, device=device)
    words = refusal(backend, dtype, max(r + s for _, r, s in shape[2]))
    if words is not None:
        with pytest.raises(RuntimeError, match=words):
            run_group(cases, backend)
        return
    with poisoned(device):
        found = run_group(cases, backend)
    check_group_error_rule(cases, found)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_products_of_a_library(monkeypatch, dtype, dropout_p):
    """What a GPU without kernels runs, here on the CPU."""
    monkeypatch.setattr(reference, "_on_gpu", lambda call: True)
    monkeypatch.setattr(fused_dropout, "_kernel", lambda device: None)
    for shape in GROUPS[1:]:
        cases = make_group(*shape, dtype, adapter_dtype=torch.float32, dropout_p=dropout_p)
        with poisoned(torch.device("cpu")):
            found = run_group(cases, "reference")
        check_group_error_rule(cases, found)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_member_is_that_layer_alone(dtype):
    """The CPU's kernels take the sums of a layer in the same order, alone or in a group: the same bits but for dx. Threads
    and runs change none."""
    cases = make_group(
        300, 96, [(64, 16, 8), (100, 5, 0), (32, 4, 4)], dtype, adapter_dtype=torch.float32, dropout_p=0.1
    )
    found, threads = run_group(cases, "cpu"), torch.get_num_threads()
    for ours, case in zip(found, cases, strict=True):
        alone = run(case, "cpu")
        assert all(torch.equal(ours[name], alone[name]) for name in alone if name != "x")
    for count in (1, 4):
        try:
            torch.set_num_threads(count)
            again = run_group(cases, "cpu")
        finally:
            torch.set_num_threads(threads)
        assert all(torch.equal(a[n], b[n]) for a, b in zip(again, found, strict=True) for n in a)


MUTANTS = {
    "another mask": lambda cases, found: [found[0], {**run(_with(cases[1], seed=9)), "x": found[1]["x"]}, *found[2:]],
    "dx lacks a member": lambda cases, found: [{**f, "x": f["x"] - run(cases[2])["x"]} for f in found],
    "dx counts one twice": lambda cases, found: [{**f, "x": f["x"] + run(cases[1])["x"]} for f in found],
    "a neighbour's dA": lambda cases, found: [{**found[0], "lora_a": found[2]["lora_a"]}, *found[1:]],
    "a neighbour's dsigma": lambda cases, found: [{**found[0], "dash_sigma": found[2]["dash_sigma"]}, *found[1:]],
    "no scaling in dB": lambda cases, found: [{**found[0], "lora_b": found[0]["lora_b"] / 2}, *found[1:]],
}


def _with(case, **changes):
    return type(case)(**{**vars(case), **changes})


@pytest.mark.parametrize("mutant", MUTANTS)
def test_mutants(mutant):
    cases = group(members=((20, 4, 3), (8, 2, 0), (10, 4, 3)), dropout_p=0.3)
    found = run_group(cases)
    check_group_error_rule(cases, found)
    with pytest.raises(AssertionError):
        check_group_error_rule(cases, MUTANTS[mutant](cases, found))


@pytest.mark.parametrize("m", [0, 70])
@pytest.mark.parametrize(("k", "members"), [(0, [(4, 2, 1)] * 2), (8, [(0, 2, 1), (4, 0, 0)]), (8, [(0, 0, 0)] * 2)])
def test_empty(backend, device, m, k, members):
    cases = make_group(m, k, members, plain_dtype(backend), dropout_p=0.2, device=device)
    check_group_error_rule(cases, run_group(cases, backend))


def test_layouts(backend, device):
    """Transposed weights, sliced x and dy."""
    cases = make_group(40, 48, [(32, 4, 2), (24, 3, 3)], plain_dtype(backend), dropout_p=0.2, device=device)
    x = torch.cat([cases[0].x] * 2, 1)[:, :48]
    for case in cases:
        case.tensors["x"] = x
        case.tensors["weight"] = case.tensors["weight"].t().contiguous().t()
        case.dy = torch.cat([case.dy] * 2, 1)[:, : case.dy.shape[1]]
    check_group_error_rule(cases, run_group(cases, backend))


@pytest.mark.parametrize("unused", [0, 2])
def test_an_output_that_nobody_uses(unused):
    cases = group(m=70)
    x, members = cases[0].x.clone().requires_grad_(), members_of(cases, True)
    outputs = dash_linear_group(x, members)
    used = [i for i in range(3) if i != unused]
    torch.autograd.backward([outputs[i] for i in used], [cases[i].dy for i in used])
    own = members[unused]
    assert own.lora_a.grad is None and own.lora_b.grad is None and own.bias.grad is None
    alone = [run(cases[i]) for i in used]
    torch.testing.assert_close(x.grad, alone[0]["x"] + alone[1]["x"])
    for i, wanted in zip(used, alone, strict=True):
        torch.testing.assert_close(members[i].lora_a.grad, wanted["lora_a"])


def test_only_what_needs_gradients():
    """x and the A of one member are frozen."""
    cases = group(dropout_p=0.3)
    members = members_of(cases, True)
    members[1].lora_a.requires_grad_(False)
    torch.manual_seed(cases[0].seed)
    outputs = dash_linear_group(cases[0].x, members, dropout_p=0.3)
    torch.autograd.backward(outputs, [case.dy for case in cases])
    assert members[1].lora_a.grad is None
    for i in (0, 2):
        torch.testing.assert_close(members[i].lora_a.grad, run(cases[i])["lora_a"])


def test_autocast_and_leading_dimensions():
    cases = group(m=24)
    x, members = cases[0].x, members_of(cases)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = dash_linear_group(x.view(2, 3, 4, 16), members)
        for y, member in zip(outputs, members, strict=True):
            assert y.dtype == torch.bfloat16 and y.shape == (2, 3, 4, member.weight.shape[0])
            own = {n: getattr(member, n) for n in ("lora_a", "lora_b", "dash_u", "dash_vt", "dash_sigma", "scaling")}
            assert torch.equal(y.view(24, -1), dash_linear(x, member.weight, member.bias, **own))


def arguments(cases, grad, seed=None, threshold=0):
    x, members = cases[0].x.clone().requires_grad_(grad), members_of(cases, grad)
    empty = {"dash_u": lambda m: m.lora_b.new_empty(len(m.lora_b), 0), "dash_vt": lambda m: m.lora_a[:0].detach()}
    lists = []
    for name in ("weight", "bias", "lora_a", "lora_b", "dash_u", "dash_vt", "dash_sigma"):
        make = empty.get(name, lambda m: m.lora_a.new_empty(0))
        lists.append([make(m) if getattr(m, name) is None else getattr(m, name) for m in members])
    return [x, *lists, seed, [m.scaling for m in members], threshold, None]


def test_compiled():
    """One graph for every M, with the output and gradients of eager."""
    torch._dynamo.reset()
    cases = group()
    members, counter = members_of(cases, True), torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    def layer(x):
        return sum(y.square().sum() for y in dash_linear_group(x, members))

    fast = torch.compile(layer, fullgraph=True, dynamic=True, backend=counter)
    frames = []
    for m in (12, 5, 9):
        results = []
        for f in (layer, fast):
            x = cases[0].x[:m].clone().requires_grad_()
            loss = f(x)
            results.append([loss.detach(), *torch.autograd.grad(loss, [x, *(m.lora_a for m in members)])])
        torch.testing.assert_close(*results)
        frames.append(counter.frame_count)
    assert frames[0] == frames[-1], "a new M compiled again"


def test_transforms_and_second_derivatives():
    cases = group()
    x, members = cases[0].x, members_of(cases)
    found = torch.func.grad(lambda x: sum(y.sum() for y in dash_linear_group(x, members)))(x)
    leaf = x.clone().requires_grad_()
    total = sum(y.sum() for y in dash_linear_group(leaf, members))
    torch.testing.assert_close(torch.autograd.grad(total, leaf)[0], found)
    total = sum(y.square().sum() for y in dash_linear_group(leaf, members))
    (dx,) = torch.autograd.grad(total, leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivatives"):
        dx.sum().backward()


def test_flops_are_those_of_the_layers():
    cases = group()

    def counted(f):
        with FlopCounterMode(display=False) as counter:
            f()
        return counter.get_total_flops()

    assert counted(lambda: run_group(cases)) == sum(counted(lambda case=case: run(case)) for case in cases) > 0


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"lora_b": torch.zeros(9, 4)}, "member 1: lora_b has shape"),
        ({"weight": torch.zeros(20, 16, dtype=torch.float64)}, "member 1: weight is torch.float64"),
        ({"weight": torch.zeros(20, 16).requires_grad_()}, "member 1: weight requires grad"),
        ({"dash_u": None}, "member 1: dash_u, dash_vt and dash_sigma go together"),
    ],
)
def test_bad_members(change, words):
    members = members_of(group(members=((20, 4, 3), (20, 4, 3))))
    members[1] = GroupMember(**{**vars(members[1]), **change})
    with pytest.raises(ValueError, match=words):
        dash_linear_group(torch.zeros(3, 16), members)


def test_bad_calls():
    members = members_of(group())
    with pytest.raises(ValueError, match="members is empty"):
        dash_linear_group(torch.zeros(3, 16), [])
    with pytest.raises(ValueError, match="dropout_p must be in"):
        dash_linear_group(torch.zeros(3, 16), members, dropout_p=1.0)
    with pytest.raises(ValueError, match="backend must be one of"):
        dash_linear_group(torch.zeros(3, 16), members, backend="none")
    lists = arguments(group(), True)
    lists[1][0].requires_grad_()
    with pytest.raises(ValueError, match="weight of member 0 requires grad"):
        torch.ops.loradash.dash_linear_group(*lists)


def test_how_a_group_runs_is_said():
    x = torch.zeros(2, 4)
    assert "in one pass over x" in explain_backend(x, "reference", members=3).how
    assert "group" not in explain_backend(x, "reference").how


def test_rows_of_one_fused_weight():
    """The weights of q, k and v may be views of one."""
    cases = group(members=((20, 4, 3), (8, 2, 0), (10, 3, 2)), m=70)
    fused = torch.cat([case.tensors["weight"] for case in cases])
    for case, rows in zip(cases, fused.split([20, 8, 10]), strict=True):
        case.tensors["weight"] = rows
    check_group_error_rule(cases, run_group(cases))
