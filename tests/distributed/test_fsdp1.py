"""FSDP1 in two processes, against one."""

from __future__ import annotations

import contextlib

import pytest
import torch
from loradash import DashConfig, apply_dash
from support.scale import CELLS, check
from support.schemes import network
from torch.distributed.fsdp import FullyShardedDataParallel


@pytest.mark.slow
@pytest.mark.parametrize("cell", [*CELLS, "cache"])
def test_fsdp1(two, cell):
    check(two[1]["fsdp1"], cell)


@pytest.mark.slow
@pytest.mark.parametrize("cell", ["train", "launch", "save", "load", "resume"])
def test_layers_kept_whole(two, cell):
    """Their weights have names below the adapted layer's."""
    check(two[1]["fsdp1_kept_whole"], cell)


@pytest.mark.slow
def test_flat_parameters_alone_are_refused(two):
    """By FSDP1, when it wraps: use_orig_params=False has no room for frozen and trained parameters in one unit."""
    assert "does not support wrapping such modules when use_orig_params=False" in two[1]["fsdp1_flat"]["train"]["error"]


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
