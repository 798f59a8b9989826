"""FSDP1: FullyShardedDataParallel."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from loradash import DashConfig
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.fsdp.wrap import ModuleWrapPolicy

from . import Block, Scheme, adapting_experts, with_experts, with_scaled_layers


class FSDP1(Scheme):
    """Every block and then the root, after `apply_dash`, with the parameters' own names."""

    flat = False

    def set_up(self) -> None:
        self.mesh = init_device_mesh("cpu", (self.processes,))

    def wrap(self, model: nn.Module) -> nn.Module:
        return FullyShardedDataParallel(
            model,
            auto_wrap_policy=ModuleWrapPolicy({Block}),
            use_orig_params=not self.flat,
            device_mesh=self.mesh,
            device_id=torch.device("cpu"),
        )

    @contextlib.contextmanager
    def reading(self, model: nn.Module) -> Iterator[None]:
        with FullyShardedDataParallel.summon_full_params(model, writeback=False):
            yield


class KeptWhole(FSDP1):
    def network(self) -> nn.Module:
        return with_scaled_layers()


class Experts(FSDP1):
    @property
    def config(self) -> DashConfig:
        return adapting_experts(super().config)

    def network(self) -> nn.Module:
        return with_experts()


class Flat(FSDP1):
    """use_orig_params=False."""

    flat = True


SCHEMES = {"fsdp1": FSDP1, "fsdp1_experts": Experts, "fsdp1_flat": Flat, "fsdp1_kept_whole": KeptWhole}
