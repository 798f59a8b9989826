"""FSDP2: `fully_shard`."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from typing import Any

import torch
from loradash import DashConfig
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from ..collectives import Traffic
from . import Scheme, adapting_experts, network, with_experts, with_scaled_layers


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

    def check_traffic(self, model: nn.Module, base: Traffic, ours: Traffic) -> None:
        """No gather more, and the blocks' two bigger by their adapters; reduced is what trains."""
        assert base.calls.keys() == {"all_gather"} and ours.calls["all_gather"] == base.calls["all_gather"]
        added = padded_bytes(p for name, p in model.named_parameters() if is_of_adapter(name))
        assert ours.bytes["all_gather"] - base.bytes["all_gather"] == 2 * added
        trained = padded_bytes(p for p in model.parameters() if p.requires_grad)
        assert ours.bytes == {"all_gather": ours.bytes["all_gather"], "reduce_scatter": trained}


def is_of_adapter(name: str) -> bool:
    return name.rpartition(".")[2] in ("lora_a", "lora_b", "dash_sigma")


def padded_bytes(parameters: Iterable[Any]) -> int:
    """What parameters take once every process's part of each is as large as the largest."""
    total = 0
    for p in parameters:
        processes = p.device_mesh.size()
        total += processes * math.ceil(p.shape[0] / processes) * p[0].numel() * p.element_size()
    return total


class Whole(FSDP2):
    """Without dropout, whose masks depend on the number of processes."""

    dropout = 0.0


class Four(Whole):
    processes = parts = 4


class Half(FSDP2):
    """A base model in bfloat16; the adapters are float32."""

    def network(self) -> nn.Module:
        model = network().to(torch.bfloat16)
        model.register_forward_pre_hook(lambda _, inputs: tuple(x.to(torch.bfloat16) for x in inputs))
        return model


class KeptWhole(FSDP2):
    def network(self) -> nn.Module:
        return with_scaled_layers()


class Experts(FSDP2):
    @property
    def config(self) -> DashConfig:
        return adapting_experts(super().config)

    def network(self) -> nn.Module:
        return with_experts()


class Layers(FSDP2):
    """Every adapted layer, then the root."""

    def wrap(self, model: Any) -> nn.Module:
        for block in model.blocks:
            self.shard(block.up)
            self.shard(block.down)
        return self.shard(model)


class Root(FSDP2):
    """The root alone, which keeps its parameters gathered after a forward pass; biases train too."""

    @property
    def config(self) -> DashConfig:
        return dataclasses.replace(super().config, train_bias=True)

    def wrap(self, model: Any) -> nn.Module:
        return self.shard(model)


class Kept(FSDP2):
    """Parameters stay gathered between the passes."""

    def options(self) -> dict[str, Any]:
        return {"reshard_after_forward": False}


class Bf16(FSDP2):
    """Computes in bfloat16, reduces and steps in float32. So does the one process, with every product rounded as here: what is
    left is the order of sums in float32."""

    def options(self) -> dict[str, Any]:
        return {"mp_policy": MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)}

    def alone(self, model: nn.Module, x: Tensor) -> Tensor:
        rounded = {name: p.to(torch.bfloat16) for name, p in model.named_parameters()}
        return functional_call(model, rounded, (x.to(torch.bfloat16),))


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
    "fsdp2_whole": Whole,
    "fsdp2_four": Four,
    "fsdp2_half": Half,
    "fsdp2_experts": Experts,
    "fsdp2_kept_whole": KeptWhole,
    "fsdp2_layers": Layers,
    "fsdp2_root": Root,
    "fsdp2_kept": Kept,
    "fsdp2_bf16": Bf16,
    "fsdp2_offloaded": Offloaded,
    "fsdp2_not_offloaded": NotOffloaded,
    "fsdp2_checkpointed": Checkpointed,
    "fsdp2_wrapped": Wrapped,
}
