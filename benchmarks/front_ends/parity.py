"""How far is a training with the authors' layers on our operator from one with their code?

    OMP_NUM_THREADS=1 python -m benchmarks.front_ends.parity [--source theirs]

Ten seconds. Two layers in a row train for 300 steps on one seed without dropout, through launch at 100: once as the authors'
classes compute them, once after `patch`, by our rules and by theirs. Prints the largest difference of any loss, that of any trained
parameter relative to the largest number in it, and how far a direction is from the one that theirs chose in its place. The
authors' code is restated (`authors.py`); with --source theirs it is that of a clone, which LORADASH_AUTHORS names.
"""

from __future__ import annotations

import argparse
import copy
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from loradash import DashSchedule, dash_layers
from loradash.integrations.subspace_tuning import patch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from .authors import CLONE, DIALECTS, SOURCES, make_model

STEPS = 300
SEMANTICS = ("authors", "loradash")
WIDTH, CLASSES = 24, 16
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, 0.3),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, 3e-3),
}


def batches(steps: int, seed: int = 1) -> Iterator[tuple[Tensor, Tensor]]:
    """Inputs and targets that these models can learn, one stream for a seed."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        x = torch.randn(16, WIDTH, generator=generator)
        yield x, x[:, :CLASSES] + 0.1 * torch.randn(16, CLASSES, generator=generator)


def losses_of(model, steps, optimizer="sgd", schedule=None, skip=0, seed=1) -> Tensor:
    """Trains; the losses of some steps of one stream of batches, from step `skip` on."""
    if not isinstance(optimizer, torch.optim.Optimizer):
        optimizer = OPTIMIZERS[optimizer]([p for p in model.parameters() if p.requires_grad])
    losses = []
    for x, target in itertools.islice(batches(skip + steps, seed), skip, None):
        optimizer.zero_grad()
        loss = (model(x) - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if schedule is not None:
            schedule.step()
    return torch.tensor(losses, dtype=torch.float64)


class Gap(NamedTuple):
    """What two trainings are apart; learned: what the losses fell by since launch, as a share of the one there."""

    loss: float
    parameters: float
    directions: float
    learned: float


def parameter_gaps(ours: nn.Module, theirs: nn.Module) -> dict[str, float]:
    """The largest differences of A, B and the coordinates, relative to the largest number of each. The directions come in pairs
    (u, v), which may both have their signs changed."""
    own = dict(theirs.named_parameters())
    return {
        name: float((p - own[name]).detach().abs().max() / own[name].detach().abs().max().clamp_min(1e-3))
        for name, p in ours.named_parameters()
        if not any(part in name for part in ("lora_change", "weight_", "lora_w_"))
    }


def direction_gap(ours: Tensor, theirs: Tensor) -> float:
    """How far |cos| of each u (N, s) and the one in its place is from 1, or of any two others from 0."""
    cosines = (ours.t() @ theirs).abs()
    return float((cosines - torch.eye(cosines.shape[0])).abs().max())


def compare(dialect: str, semantics: str, optimizer: str, source: str = "restated") -> Gap:
    """Both trainings. Raises RuntimeError where ours did not launch, or counts otherwise than theirs."""
    theirs = make_model(dialect, source)
    ours = copy.deepcopy(theirs)
    patch(ours, semantics)
    schedule = DashSchedule(ours, progress=False) if semantics == "loradash" else None
    wanted, found = losses_of(theirs, STEPS, optimizer), losses_of(ours, STEPS, optimizer, schedule)
    layers = dash_layers(ours)
    for name, layer in layers.items():
        if not bool(layer.launched) or layer.FLAG != theirs[int(name)].FLAG:
            raise RuntimeError(
                f"{name}: launched {bool(layer.launched)}, FLAG {layer.FLAG}, theirs {theirs[int(name)].FLAG}"
            )
    # Layers of theirs on our operator, to read U wherever it is kept.
    patch(theirs, "authors")
    others = dash_layers(theirs)
    return Gap(
        float((found - wanted).abs().max()),
        max(parameter_gaps(ours, theirs).values()),
        max(direction_gap(layer.dash_u.detach(), others[name].dash_u.detach()) for name, layer in layers.items()),
        float(1 - wanted[-1] / wanted[STEPS // 3 - 1]),
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", choices=SOURCES, default="restated")
    options = parser.parse_args(arguments)
    if options.source == "theirs" and CLONE is None:
        parser.error("--source theirs: LORADASH_AUTHORS names no clone of the authors' repository")
    table = Table("code base", "rules", "optimizer", "loss", "parameters", "directions")
    for dialect in DIALECTS:
        for semantics in SEMANTICS:
            for optimizer in OPTIMIZERS:
                gap = compare(dialect, semantics, optimizer, options.source)
                table.add_row(dialect, semantics, optimizer, *(f"{value:.1e}" for value in gap[:3]))
    Console().print(table)


if __name__ == "__main__":
    main()
