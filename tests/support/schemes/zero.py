"""DeepSpeed's ZeRO, stages 1 to 3."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from loradash import DashConfig, DashSchedule, dash_layers, dash_parameter_groups
from torch import Tensor, nn

from . import Run, Scheme, adapting_experts, with_experts


def prepare() -> None:
    """DeepSpeed for processes that have a gloo group already; nothing of its own is compiled."""
    # What its launcher would set.
    rank, processes = str(dist.get_rank()), str(dist.get_world_size())
    os.environ.update(DS_ACCELERATOR="cpu", RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=processes)
    import deepspeed

    # Its collectives in shared memory take most of a minute to build.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("gloo", auto_mpi_discovery=False, verbose=False)


def settings(stage: int, **more: Any) -> dict[str, Any]:
    """DeepSpeed's configuration: on this network every parameter of stage 3 is kept in parts. By default it clips gradients
    to a norm of 1."""
    return {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0, **more},
        "zero_allow_untested_optimizer": True,
    }


class ZeRO(Scheme):
    """Stage 1, 2 or 3, as the name says, with a client's AdamW. `run.optimizer` is the engine's."""

    @property
    def stage(self) -> int:
        return int(self.name[-1])

    def import_all(self) -> None:
        super().import_all()
        os.environ["DS_ACCELERATOR"] = "cpu"
        import deepspeed  # noqa: F401

    def set_up(self) -> None:
        prepare()

    def look_apart(self, folder: Path) -> None:
        from ..zero_apart import keeps_apart

        keeps_apart(self, folder)

    def wrap(self, model: nn.Module) -> Any:
        import deepspeed

        return deepspeed.initialize(
            model=model, optimizer=self.optimizer(model), config=settings(self.stage), dist_init_required=False
        )[0]

    def begin(self, model: nn.Module) -> Run:
        engine = self.wrap(model)
        return Run(engine, engine.optimizer, DashSchedule(engine, progress=False))

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        if not dash_layers(model):
            return super().optimizer(model)
        groups = dash_parameter_groups(model, lr=1e-2)
        # One process decays all alike.
        return torch.optim.AdamW([{**group, "weight_decay": 0.01} for group in groups])

    def step(self, run: Run, x: Tensor, target: Tensor) -> Tensor:
        loss = self.loss(run.model(x), target)
        run.model.backward(loss)
        run.model.step()
        run.schedule.step()
        return loss.detach()

    def save_checkpoint(self, run: Run, folder: Path) -> None:
        run.model.save_checkpoint(str(folder), client_state={"schedule": run.schedule.state_dict()})

    def load_checkpoint(self, run: Run, folder: Path) -> None:
        _, client = run.model.load_checkpoint(str(folder))
        run.schedule.load_state_dict(client["schedule"])


class Experts(ZeRO):
    stage = 3  # type: ignore[assignment]

    @property
    def config(self) -> DashConfig:
        return adapting_experts(super().config)

    def network(self) -> nn.Module:
        return with_experts()


SCHEMES = {"zero1": ZeRO, "zero2": ZeRO, "zero3": ZeRO, "zero3_experts": Experts}
