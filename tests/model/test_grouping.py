"""Layers of a model that are computed together: the same numbers as apart, whatever happens in between."""

from __future__ import annotations

import copy
import gc
import io
import os
import sys
import weakref
from dataclasses import replace
from pathlib import Path

import loradash.grouping
import pytest
import torch
import torch._dynamo.testing
from loradash import (
    DashConfig,
    DashLinear,
    apply_dash,
    dash_layers,
    disable,
    group_projections,
    merge,
    merge_and_unload,
    ungroup_projections,
    unmerge,
)
from support.processes import run_processes
from support.projections import QKV, adapted, step
from torch import nn
from torch.nn.utils import prune
from torch.utils.checkpoint import checkpoint

from loradash_kernels import notices


@pytest.fixture(autouse=True)
def nothing_was_said(monkeypatch):
    monkeypatch.setattr(notices, "_given", set())


@pytest.fixture
def calls(monkeypatch):
    """How many members every group had that was computed."""
    found, run = [], loradash.grouping.dash_linear_group

    def counted(x, members, **options):
        found.append(len(members))
        return run(x, members, **options)

    monkeypatch.setattr(loradash.grouping, "dash_linear_group", counted)
    return found


@pytest.fixture
def pair():
    """A model, and the same with its projections grouped."""
    plain = adapted()
    grouped = copy.deepcopy(plain)
    assert group_projections(grouped, [QKV]) == [tuple(f"attention.{name}" for name in QKV)]
    return plain, grouped


def same(pair, *args, **kwargs):
    plain, grouped = (step(model, *args, **kwargs) for model in pair)
    assert len(plain) == len(grouped)
    for a, b in zip(plain, grouped, strict=True):
        torch.testing.assert_close(b, a)


def group_of(model):
    return model.attention.q_proj.group


def test_outputs_and_gradients(pair, calls):
    same(pair)
    assert calls == [3] and group_of(pair[1]).record is None


def test_one_mask_for_all(calls):
    """A group drops the same elements of x for every member: x of one column that is dropped adds nothing to any."""
    model = adapted(dropout=0.5)
    group_projections(model, [QKV])
    with torch.no_grad():
        for layer in dash_layers(model).values():
            layer.weight.zero_(), layer.bias.zero_()
            layer.lora_a.fill_(1), layer.lora_b.fill_(1), layer.dash_sigma.zero_()
    x = torch.zeros(64, 16)
    x[:, 3] = 1
    q, k, v = (y[:, 0] != 0 for y in model(x))
    assert torch.equal(q, k) and torch.equal(q, v) and 10 < q.sum() < 54


def test_eval_no_grad_and_switches(pair, calls):
    for model in pair:
        model.eval()
    with torch.no_grad():
        x = torch.randn(2, 16)
        for a, b in zip(pair[0](x), pair[1](x), strict=True):
            torch.testing.assert_close(b, a)
    assert calls == [3]
    same(pair)
    with disable(pair[0]), disable(pair[1]):
        x = torch.randn(2, 16)
        torch.testing.assert_close(pair[1](x), pair[0](x))
    for model in pair:
        merge(model)
    torch.testing.assert_close(pair[1](x), pair[0](x))
    assert calls == [3, 3], "switched off and merged, every layer is its own"
    for model in pair:
        unmerge(model)
    same(pair)
    # One member is in another mode: the other two are a group, if they follow each other.
    for model in pair:
        model.train().attention.k_proj.eval()
    same(pair)
    assert calls == [3, 3, 3, 2]
    # Nor can a mask serve a member that drops another share.
    for model in pair:
        layer = model.attention.v_proj
        layer.config = replace(layer.config, dropout=0.5)
    same(pair)
    assert calls == [3, 3, 3, 2], "k_proj is in another mode, v_proj drops otherwise: nobody is left to group"


def test_autocast(pair, calls):
    x = torch.randn(4, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for a, b in zip(pair[0](x), pair[1](x), strict=True):
            assert a.dtype == b.dtype == torch.bfloat16
            torch.testing.assert_close(b, a)
    assert calls == [3]


def test_inference_mode_computes_apart(pair, calls):
    with torch.inference_mode():
        x = torch.randn(4, 16)
        torch.testing.assert_close(pair[1](x), pair[0](x))
    assert calls == []


def test_x_is_written_between_the_calls(pair, calls):
    for model in pair:
        model.attention.between = lambda x: x.detach().add_(1)
    x = torch.randn(4, 16)
    first = pair[0](x.clone())
    with pytest.warns(UserWarning, match=r"attention\.k_proj, attention\.v_proj was computed with its group"):
        second = pair[1](x.clone())
    torch.testing.assert_close(second, first)


def test_other_orders(pair, calls):
    for model in pair:
        model.attention.order = ("v_proj", "k_proj", "q_proj")
    same(pair)
    assert calls == [], "a member computes those that are called after it, as far as they were not called yet"
    for model in pair:
        model.attention.order = ("q_proj", "v_proj", "k_proj")
    same(pair)
    assert calls == [3]


@pytest.mark.filterwarnings("ignore:.*was computed with its group")
def test_cross_attention_and_skipped_members(pair, calls):
    """k and v see another tensor than q: they are a group of two, and the right numbers in any case."""
    torch.manual_seed(3)
    memory = torch.randn(3, 7, 16)
    same(pair, memory)
    assert calls == [3, 2]
    same(pair, skip=("k_proj",))
    x = torch.randn(4, 16, requires_grad=True)
    outputs = pair[1](x, skip=("k_proj",))
    seen = weakref.ref(x)
    del x, outputs
    gc.collect()
    assert seen() is None and group_of(pair[1]).record is None, "nothing waits after the call"


def test_a_call_outside_the_parent_is_apart(pair, calls):
    x = torch.randn(4, 16)
    attention = pair[1].attention
    for name in QKV:
        torch.testing.assert_close(getattr(attention, name)(x), getattr(pair[0].attention, name)(x))
    assert calls == []


def test_an_error_within_the_parent(pair, calls):
    def fail(x):
        raise RuntimeError("between")

    pair[1].attention.between = fail
    with pytest.raises(RuntimeError, match="between"):
        pair[1](torch.randn(2, 16))
    assert group_of(pair[1]).record is None and not group_of(pair[1]).open
    pair[1].attention.between = None
    same(pair)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints(reentrant, calls):
    """Recomputed in backward, with dropout: the same masks, so the same gradients as without a checkpoint."""
    model = adapted(dropout=0.3)
    group_projections(model, [QKV])
    found = []
    for f in (model, lambda x: checkpoint(lambda x: tuple(model(x)), x, use_reentrant=reentrant)):
        torch.manual_seed(7)
        x = torch.randn(6, 16, requires_grad=True)
        model.zero_grad()
        torch.autograd.backward([y.square().sum() for y in f(x)])
        found.append([x.grad, *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
    assert calls == [3, 3, 3] and all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.filterwarnings("ignore:.*was computed with its group")
def test_hooks_of_single_members(pair):
    for model in pair:
        model.attention.k_proj.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
        model.attention.v_proj.register_forward_hook(lambda module, args, output: output + 1)
        # PyTorch gives a layer with such a hook a view of x.
        model.attention.q_proj.register_full_backward_hook(lambda module, before, after: None)
    same(pair)


def test_a_tensor_of_a_member_is_another_one_when_it_is_called(pair):
    """Pruning makes A anew in a hook before each call."""
    for model in pair:
        prune.l1_unstructured(model.attention.v_proj, "lora_a", amount=0.5)
        with torch.no_grad():
            model.attention.v_proj.lora_a_orig.mul_(2)
    same(pair)
    same(pair)


def test_copies_files_and_ungrouping(pair, calls):
    again = copy.deepcopy(pair[1])
    assert group_of(again) is not group_of(pair[1]) and group_of(again).members[0] is again.attention.q_proj
    file = io.BytesIO()
    torch.save(pair[1], file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    same((pair[0], again))
    same((pair[0], loaded))
    assert calls == [3, 3]
    assert again.state_dict().keys() == pair[0].state_dict().keys()
    ungroup_projections(again)
    same((pair[0], again))
    assert calls == [3, 3] and group_of(again) is None
    assert not again.attention._forward_hooks and not again.attention._forward_pre_hooks
    group_projections(again, [QKV])
    merged = merge_and_unload(again)
    assert not merged.attention._forward_hooks and "group" not in vars(merged.attention.q_proj)


def test_compiled_layers_are_computed_apart(pair, calls):
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("eager")
    fast = torch.compile(pair[1], fullgraph=True, backend=counter)
    same((pair[0], fast))
    same((pair[0], fast))
    assert counter.frame_count == 1 and calls == []


def test_what_is_refused():
    model = adapted()
    for groups, words in (
        ([("q_proj",)], "wanted the names of two layers"),
        ([("q_proj", "o_proj")], "no adapted layer has the name attention.o_proj"),
        ([("o_proj", "q_proj")], "o_proj is no adapted layer"),
        ([QKV, QKV[:2]], "stands twice"),
        (None, "no group of adapted layers was found"),
    ):
        with pytest.raises(ValueError, match=words):
            group_projections(model, groups)
    assert all(layer.group is None for layer in dash_layers(model).values())
    group_projections(model, [QKV])
    with pytest.raises(ValueError, match=r"attention\.q_proj is in a group already"):
        group_projections(model, [QKV])
    model = adapted()
    model.attention.k_proj.config = replace(model.attention.k_proj.config, dropout=0.1)
    with pytest.raises(ValueError, match=r"of one dropout: attention\.q_proj 0\.0, attention\.k_proj 0\.1"):
        group_projections(model, [QKV])
    model = adapted()
    model.attention.v_proj = DashLinear.from_linear(nn.Linear(16, 8, dtype=torch.bfloat16), DashConfig(r=4))
    with pytest.raises(ValueError, match="of one dtype"):
        group_projections(model, [QKV])


def test_a_layer_that_was_sharded_by_itself(pair):
    """Its memory is given back until its own call."""
    pair[1].attention.k_proj.weight.untyped_storage().resize_(0)
    with pytest.raises(ValueError, match=r"attention\.k_proj: its parameters are not there while attention\.q_proj"):
        pair[1](torch.randn(2, 16))


def test_known_architectures(calls):
    transformers = pytest.importorskip("transformers")
    small = {"vocab_size": 30, "num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 16}
    t5 = transformers.T5Config(
        vocab_size=30, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, feed_forward_proj="gated-gelu"
    )
    ids = torch.arange(8).view(2, 4)
    for make, config, wanted, inputs in (
        (transformers.LlamaModel, transformers.LlamaConfig(**small, intermediate_size=24), [3, 2], {}),
        (transformers.BertModel, transformers.BertConfig(**small, intermediate_size=24), [3], {}),
        (transformers.T5Model, t5, [3, 2, 3, 2, 2], {"decoder_input_ids": ids}),
    ):
        torch.manual_seed(0)
        plain = apply_dash(make(config), DashConfig(r=2, directions=2)).eval()
        grouped = copy.deepcopy(plain)
        names = group_projections(grouped)
        calls.clear()
        with torch.no_grad():
            found, apart = (model(input_ids=ids, **inputs).last_hidden_state for model in (grouped, plain))
        torch.testing.assert_close(found, apart)
        assert calls == wanted and sorted(map(len, names)) == sorted(wanted), make.__name__


WORKER = """
import copy, os, sys
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP1
from torch.distributed.fsdp import fully_shard
from loradash import DashConfig, apply_dash, dash_layers, group_projections
from support.projections import QKV, Model, adapted, step

dist.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=int(sys.argv[1]), world_size=2)
mesh = init_device_mesh("cpu", (2,))
plain = adapted()
wanted = step(plain)

def grouped():
    model = copy.deepcopy(plain)
    group_projections(model, [QKV])
    return model

def whole(t):
    return t.full_tensor() if hasattr(t, "full_tensor") else t

def block():
    model = grouped()
    fully_shard(model.attention, mesh=mesh)
    return fully_shard(model, mesh=mesh)

for model in (nn.parallel.DistributedDataParallel(grouped()), block()):
    for found, expected in zip(step(model), wanted, strict=True):
        torch.testing.assert_close(whole(found), expected)

model = grouped()
for layer in dash_layers(model).values():
    fully_shard(layer, mesh=mesh)
fully_shard(model, mesh=mesh)
try:
    step(model)
except ValueError as error:
    assert "attention.k_proj: its parameters are a DTensor while attention.q_proj computes their group" in str(error), error
else:
    raise AssertionError("layers that are sharded by themselves were taken")
dist.barrier()
print("done", flush=True)
os._exit(0)
"""


def test_sharded_models(tmp_path, monkeypatch):
    """DDP and FSDP2 by block as one process; FSDP2 by layer is refused before anything is computed."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parents[1]), *sys.path]))
    assert [said.split() for said in run_processes(WORKER, tmp_path)] == [["done"]] * 2
