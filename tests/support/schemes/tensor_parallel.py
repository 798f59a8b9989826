"""Tensor parallelism, alone and under FSDP2."""

from __future__ import annotations

from typing import Any

from loradash.tensor_parallel import ColwiseDash, RowwiseDash
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import parallelize_module

from . import Scheme

PLAN = {"blocks.*.up": ColwiseDash(), "blocks.*.down": RowwiseDash()}


class TensorParallel(Scheme):
    """Two processes share every layer, and the whole batch."""

    parts = 1

    def set_up(self) -> None:
        self.mesh = init_device_mesh("cpu", (self.processes,), mesh_dim_names=("tp",))

    def wrap(self, model: Any) -> nn.Module:
        return parallelize_module(model, self.mesh["tp"], PLAN)


class UnderFSDP2(TensorParallel):
    """Two groups of two: each group shares every layer, and has one part of the batch."""

    processes, parts = 4, 2

    def set_up(self) -> None:
        self.mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))

    def wrap(self, model: Any) -> nn.Module:
        model = super().wrap(model)
        for block in model.blocks:
            fully_shard(block, mesh=self.mesh["dp"])
        return fully_shard(model, mesh=self.mesh["dp"])


SCHEMES = {"tp2": TensorParallel, "tp2_fsdp2": UnderFSDP2}
