"""The ways of training one model in several processes that tests/distributed holds against one process.

A scheme is a class in a file of this folder, named in `FILES`; `support.scale_worker` runs it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import loradash
import torch
import torch.distributed as dist
from loradash import DashConfig, DashSchedule
from torch import Tensor, nn
from torch.nn import functional as F

from ..collectives import Traffic

FILES = {
    "ddp": "data_parallel",
    "fsdp1": "fsdp1",
    "fsdp2": "fsdp2",
    "tp2": "tensor_parallel",
    "zero1": "zero",
    "zero2": "zero",
    "zero3": "zero",
}
"""The file of a scheme, by what its name has before the first underscore."""

# x is (ROWS, TOKENS, WIDTH); every part of a batch takes its share of the rows.
ROWS, TOKENS, WIDTH, HIDDEN, CLASSES = 8, 3, 24, 32, 10
STEPS, LAUNCH = 8, 4


class Block(nn.Module):
    """A residual block of two rectangular layers: `up` may be sharded by columns and `down` by rows, in multiples of 8."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, HIDDEN)
        self.down = nn.Linear(HIDDEN, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(x)))


class Network(nn.Module):
    """Two blocks and a head, the same in every process."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def network() -> Network:
    """A new base model, of one seed."""
    torch.manual_seed(0)
    return Network()


class Scaled(nn.Linear):
    """A layer that computes in a way of its own, so that an adapter keeps it whole."""

    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * super().forward(x)


def with_scaled_layers() -> Network:
    model = network()
    for block in model.blocks:
        scaled = Scaled(HIDDEN, WIDTH)
        scaled.load_state_dict(block.down.state_dict())
        block.down = scaled
    return model


class Mixture(nn.Module):
    """transformers' experts, two of four for every token, by fixed features of it."""

    def __init__(self) -> None:
        from transformers import MixtralConfig
        from transformers.models.mixtral.modeling_mixtral import MixtralExperts

        super().__init__()
        sizes = {"hidden_size": WIDTH, "intermediate_size": CLASSES, "num_local_experts": 4, "num_experts_per_tok": 2}
        self.experts = MixtralExperts(MixtralConfig(**sizes))
        for parameter in self.experts.parameters():
            nn.init.normal_(parameter, std=0.3)

    def forward(self, x: Tensor) -> Tensor:
        weights, index = x[..., :4].flatten(0, 1).softmax(-1).topk(2)
        return self.experts(x.flatten(0, 1), index, weights).view_as(x)


def with_experts() -> Network:
    """Every block's `down` is followed by a mixture."""
    model = network()
    for block in model.blocks:
        block.down = nn.Sequential(block.down, Mixture())
    return model


def batch(step: int) -> tuple[Tensor, Tensor]:
    """x (ROWS, TOKENS, WIDTH) and the target (ROWS, TOKENS, CLASSES) of a step."""
    draw = torch.Generator().manual_seed(1000 + step)
    return torch.randn(ROWS, TOKENS, WIDTH, generator=draw), torch.randn(ROWS, TOKENS, CLASSES, generator=draw)


def adapting_experts(config: DashConfig) -> DashConfig:
    """The settings with the experts of `with_experts` beside."""
    return dataclasses.replace(config, target_parameters=["experts.gate_up_proj", "experts.down_proj"])


class Run(NamedTuple):
    """What a training program holds."""

    model: Any
    optimizer: Any
    schedule: DashSchedule


class Scheme:
    """One way of training. A subclass says `wrap` at least; everything else has a default that suits torch's own wrappers.

    Attributes:
        processes: how many it takes.
        parts: into how many parts a batch is split. Processes of one part draw the same dropout mask.
        dropout: of the adapters. The one process draws for every part as the part's own processes do.
        loss_tolerance: allowed gap of losses, absolute; they are near 1.
        tolerance: allowed gap of trained tensors and outputs after 8 steps, relative to the largest.
    """

    processes = 2
    parts = 2
    dropout = 0.25
    loss_tolerance = 1e-5
    tolerance = 1e-4

    def __init__(self, name: str, rank: int) -> None:
        self.name, self.rank = name, rank

    @property
    def config(self) -> DashConfig:
        # 3 rows over 2 processes make uneven shards; a head trains as a whole.
        return DashConfig(r=3, directions=3, prelaunch_steps=LAUNCH, dropout=self.dropout, trainable_modules=["head"])

    def network(self) -> nn.Module:
        """A new base model."""
        return network()

    def adapted(self) -> nn.Module:
        """A new model for `begin`."""
        return loradash.apply_dash(self.network(), self.config)

    def frozen(self) -> nn.Module | None:
        """The base model alone as this scheme holds it, for what it sends in a step; None where it sends nothing."""
        return self.wrap(self.network().requires_grad_(False))

    def check_traffic(self, model: nn.Module, base: Traffic, ours: Traffic) -> None:
        """AssertionError where a step of an adapted model sends what it need not, beside a frozen model's."""
        raise NotImplementedError

    def look_apart(self, folder: Path) -> None:
        """AssertionError where something that only this scheme has is not right."""
        raise NotImplementedError

    def part(self) -> int:
        """Which part of a batch this process computes."""
        return self.rank * self.parts // self.processes

    def import_all(self) -> None:
        """Imports what this scheme will import, in the process of which the others are forks, and computes nothing."""
        import torch.distributed.checkpoint.state_dict  # noqa: F401

        run = self.adapted()
        self.optimizer(run)
        DashSchedule(run, progress=False)

    def set_up(self) -> None:
        """Called once, in every process, when the group is there: meshes are made here."""

    def wrap(self, model: nn.Module) -> nn.Module:
        """A model, adapted or not, as this scheme trains it."""
        raise NotImplementedError

    def begin(self, model: nn.Module) -> Run:
        """A training program of a model of `apply_dash`."""
        wrapped = self.wrap(model)
        return Run(wrapped, self.optimizer(wrapped), DashSchedule(wrapped, progress=False))

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)

    def alone(self, model: nn.Module, x: Tensor) -> Tensor:
        """What one process computes for the processes to be held against."""
        return model(x)

    def forward(self, model: nn.Module, x: Tensor) -> Tensor:
        """The whole output of a model in evaluation, as a plain tensor."""
        training = model.training
        model.eval()
        with torch.no_grad():
            y = model(x)
        model.train(training)
        return y

    def loss(self, y: Tensor, target: Tensor) -> Tensor:
        return F.mse_loss(y.float(), target)

    def step(self, run: Run, x: Tensor, target: Tensor) -> Tensor:
        """One step on this process's part of a batch; the seed for dropout is set. Returns the part's loss."""
        loss = self.loss(run.model(x), target)
        loss.backward()
        run.optimizer.step()
        run.optimizer.zero_grad()
        run.schedule.step()
        return loss.detach()

    @contextlib.contextmanager
    def whole(self, model: nn.Module, writing: bool = False) -> Iterator[None]:
        """Within the block parameters can be saved, and with `writing` written: for wrappers of which we ask it."""
        yield

    @contextlib.contextmanager
    def reading(self, model: nn.Module) -> Iterator[None]:
        """Within the block parameters are whole, or DTensors, for the tests to look at."""
        with self.whole(model):
            yield

    def trained(self, model: nn.Module) -> nn.Module:
        """The model whose layers `dash_layers` names, inside `whole`."""
        return model

    def save_checkpoint(self, run: Run, folder: Path) -> None:
        """Model, optimizer and schedule, to go on from."""
        loradash.save_training(folder, *run)

    def load_checkpoint(self, run: Run, folder: Path) -> None:
        loradash.load_training(folder, *run)


def scheme(name: str, rank: int) -> Scheme:
    """The scheme of a name: its file's `SCHEMES[name]`."""
    file = importlib.import_module(f"support.schemes.{FILES[name.partition('_')[0]]}")
    return file.SCHEMES[name](name, rank)


def of_part(tensor: Tensor, part: int, parts: int) -> Tensor:
    """A part's rows."""
    return tensor.chunk(parts)[part]


def mean_over_processes(value: Tensor) -> float:
    total = value.detach().double().reshape(1).clone()
    dist.all_reduce(total)
    return total.item() / dist.get_world_size()
