"""Models wrapped by DDP, FSDP1 and FSDP2, in a world of one process."""

from __future__ import annotations

import contextlib

import loradash
import pytest
import torch
from loradash import DashConfig, DashSchedule, apply_dash, dash_layers, load_adapter, merge_and_unload, save_adapter
from safetensors.torch import load_file
from support.schemes import network
from torch import nn
from torch.distributed._composable.replicate import replicate
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel


def test_replicated_models_are_adapted_first(process_group):
    """By torch's `replicate`, which leaves a model's class as it is, or makes it one of FSDP2's."""
    model = network()
    replicate(model)
    with pytest.raises(ValueError, match=r"wrapped in .*; apply_dash comes before it"):
        apply_dash(model, DashConfig(r=2))
    assert not dash_layers(model)


@pytest.mark.parametrize("thawed", [False, True])
def test_a_weight_that_trains_is_refused(process_group, thawed):
    """All parameters of a unit are views of one that trains: what each was declared as tells which may not."""
    model = apply_dash(network(), DashConfig(r=2))
    model.blocks[0].up.weight.requires_grad_(thawed)
    flat = FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))
    with (
        pytest.raises(ValueError, match=r"blocks\.0\.up: weight requires grad") if thawed else contextlib.nullcontext()
    ):
        flat(torch.zeros(1, 24)).sum().backward()
    assert thawed or model.blocks[0].up.weight.grad is None


@pytest.mark.parametrize("ran", [False, True], ids=["new", "after a forward pass"])
@pytest.mark.parametrize("whole", [True, False], ids=["root", "block"])
def test_sharding_comes_after_adapting(process_group, whole, ran):
    """After a forward pass the root's parameters are plain tensors, whose memory FSDP2 will free."""
    model = network()
    fully_shard(model if whole else model.blocks[0], mesh=process_group)
    if ran:
        model(torch.zeros(1, 24))
    with pytest.raises(ValueError, match=r"wrapped in fully_shard \(FSDP\w+\); apply_dash comes before it"):
        apply_dash(model, DashConfig(r=2))
    assert not dash_layers(model)


@pytest.mark.parametrize("ran", [False, True], ids=["new", "after a forward pass"])
def test_sharded_models_are_not_unloaded(process_group, tmp_path, ran):
    model = fully_shard(apply_dash(network(), DashConfig(r=2)), mesh=process_group)
    if ran:
        model(torch.zeros(1, 24))
    with pytest.raises(ValueError, match=r"the model is wrapped in fully_shard .*load_adapter\(plain_model"):
        merge_and_unload(model)
    assert len(dash_layers(model)) == 5
    merge_and_unload(load_adapter(network(), save_adapter(model, tmp_path)))


@pytest.mark.parametrize("ran", [False, True], ids=["new", "after a forward pass"])
def test_layers_kept_whole_are_not_merged(process_group, ran):
    """What is written to a gathered weight would be lost with it."""
    model = network()
    model.blocks[0].up.register_forward_hook(lambda *_: None)
    fully_shard(apply_dash(model, DashConfig(r=2)), mesh=process_group)
    if ran:
        model(torch.zeros(1, 24))
    with pytest.raises(ValueError, match=r"blocks\.0\.up: Linear is kept whole, and sharded"):
        loradash.merge(model)
    assert not any(layer.merged for layer in dash_layers(model).values())


class Tripled(nn.Linear):
    """Kept whole."""

    def forward(self, x):
        return 3 * super().forward(x)


def tripled():
    """Adapted, with an update."""
    torch.manual_seed(0)
    model = apply_dash(nn.Sequential(Tripled(16, 24), nn.Linear(24, 8)), DashConfig(r=2, directions=2))
    for layer in dash_layers(model).values():
        nn.init.normal_(layer.lora_b)
    return model


def test_mixed_precision_of_layers_kept_whole(process_group, tmp_path):
    """The layer is asked for its products in bfloat16; adapters are read as they are, in float32."""
    model, one = tripled(), tripled()
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    fully_shard(model, mesh=process_group, mp_policy=policy)
    assert all(
        map(
            torch.equal,
            load_file(save_adapter(model, tmp_path)).values(),
            load_file(save_adapter(one, tmp_path / "one")).values(),
        )
    )
    loradash.prelaunch(model, progress=False)
    loradash.prelaunch(one, progress=False)
    ours, theirs = (m[0].dash_u @ m[0].dash_vt for m in (model, one))
    torch.testing.assert_close(ours, theirs, rtol=0.05, atol=0.02)


def test_a_sharded_layer_that_nothing_can_ask_is_refused(process_group):
    """Its weight is not what it multiplies with."""
    model = tripled()
    parallelize_module(model[0].base, process_group, ColwiseParallel())
    with pytest.raises(ValueError, match=r"^0: Tripled computes in a way of its own, and its weight is sharded"):
        loradash.prelaunch(model, progress=False)
    assert not any(layer.launched for layer in dash_layers(model).values())


def launched(alone=False):
    model = apply_dash(network(), DashConfig(r=2, directions=2))
    for layer in dash_layers(model).values():
        nn.init.normal_(layer.lora_b)
    loradash.prelaunch(model, progress=False)
    if alone:
        loradash.dash_only(model)
    return model


@pytest.mark.parametrize("freezes", [True, False], ids=["freezes", "thaws"])
def test_what_ddp_averages_stays_what_trains(process_group, tmp_path, freezes):
    """It would wait for gradients that do not come, or leave those that it does not know as they are in each process."""
    model, file = launched(not freezes), save_adapter(launched(freezes), tmp_path)
    ddp = DistributedDataParallel(model)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    with pytest.raises(ValueError, match="make that anew"):
        load_adapter(ddp, file)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert loradash.dash_state(model).dash_only is not freezes
    del ddp
    load_adapter(model, file)


def test_a_run_of_frozen_adapters_is_not_loaded_into_ddp(process_group, tmp_path):
    """With nothing changed."""

    def run_of(model):
        return model, torch.optim.SGD([p for p in model.parameters() if p.requires_grad]), DashSchedule(model)

    loradash.save_training(tmp_path, *run_of(launched(alone=True)))
    model = DistributedDataParallel(apply_dash(network(), DashConfig(r=2, directions=2)))
    before = {name: t.clone() for name, t in model.state_dict().items()}
    with pytest.raises(ValueError, match="make that anew"):
        loradash.load_training(tmp_path, *run_of(model))
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def test_ddp_may_look_for_what_froze(process_group):
    model = launched()
    loradash.dash_only(DistributedDataParallel(model, find_unused_parameters=True))
    assert not dash_layers(model)["head"].lora_a.requires_grad
