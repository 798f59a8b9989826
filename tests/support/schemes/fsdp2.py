"""FSDP2: `fully_shard`."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.utils.checkpoint import checkpoint

from . import Scheme


class FSDP2(Scheme):
    """Every block and then the root, after `apply_dash`."""

    def set_up(self) -> None:
        self.mesh = init_device_mesh("cpu", (self.processes,))

    def options(self) -> dict[str, Any]:
        """Beside the mesh, of `fully_shard`."""
        return {}

    def shard(self, module: nn.Module) -> nn.Module:
        return fully_shard(module, mesh=self.mesh, **self.options())

    def wrap(self, model: Any) -> nn.Module:
        for block in model.blocks:
            self.shard(block)
        return self.shard(model)


class Layers(FSDP2):
    """Every adapted layer, then the root."""

    def wrap(self, model: Any) -> nn.Module:
        for block in model.blocks:
            self.shard(block.up)
            self.shard(block.down)
        return self.shard(model)


class Root(FSDP2):
    """The root alone, which keeps its parameters gathered after a forward pass."""

    def wrap(self, model: Any) -> nn.Module:
        return self.shard(model)


class Kept(FSDP2):
    """Parameters stay gathered between the passes."""

    def options(self) -> dict[str, Any]:
        return {"reshard_after_forward": False}


class Bf16(FSDP2):
    """Computes in bfloat16, reduces in float32. One process computes in float32."""

    loss_tolerance = 2e-2
    tolerance = 1e-1

    def options(self) -> dict[str, Any]:
        return {"mp_policy": MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)}


class Offloaded(FSDP2):
    """The policy that keeps shards on the CPU: there, where it has nothing to move."""

    def options(self) -> dict[str, Any]:
        return {"offload_policy": CPUOffloadPolicy(pin_memory=False)}


class NotOffloaded(FSDP2):
    def options(self) -> dict[str, Any]:
        return {"offload_policy": OffloadPolicy()}


class Checkpointed(FSDP2):
    """Blocks are computed again in the backward pass, with the mask of the first time."""

    def wrap(self, model: Any) -> nn.Module:
        for block in model.blocks:
            plain = block.forward
            block.forward = lambda x, plain=plain: checkpoint(plain, x, use_reentrant=False)
        return super().wrap(model)


class Wrapped(FSDP2):
    """The same by torch's wrapper, which puts a name into those of the layers."""

    def wrap(self, model: Any) -> nn.Module:
        model.blocks = nn.ModuleList([checkpoint_wrapper(block) for block in model.blocks])
        return super().wrap(model)


SCHEMES = {
    "fsdp2": FSDP2,
    "fsdp2_layers": Layers,
    "fsdp2_root": Root,
    "fsdp2_kept": Kept,
    "fsdp2_bf16": Bf16,
    "fsdp2_offloaded": Offloaded,
    "fsdp2_not_offloaded": NotOffloaded,
    "fsdp2_checkpointed": Checkpointed,
    "fsdp2_wrapped": Wrapped,
}
