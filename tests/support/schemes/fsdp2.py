"""FSDP2: `fully_shard`."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from . import Scheme


class FSDP2(Scheme):
    """Every block and then the root, after `apply_dash`."""

    def set_up(self) -> None:
        self.mesh = init_device_mesh("cpu", (self.processes,))

    def options(self) -> dict[str, Any]:
        return {"mesh": self.mesh}

    def wrap(self, model: Any) -> nn.Module:
        for block in model.blocks:
            fully_shard(block, **self.options())
        return fully_shard(model, **self.options())


SCHEMES = {"fsdp2": FSDP2}
