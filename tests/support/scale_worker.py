"""The processes of `support.scale`: python -m support.scale_worker SCHEMES FOLDER PROCESSES, SCHEMES being JSON, the cells of
every scheme by its name.

Modules take seconds to import, so one process does that and the others are its forks. Every cell is compared with what one
process makes of the same batches, computed in each before they meet. Each writes FOLDER/SCHEME/result.RANK.json after every
cell, so that nothing is lost where a later one hangs, and says the rest in FOLDER/output.RANK.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
import traceback
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import loradash
import torch
import torch.distributed as dist
from loradash import DashSchedule, dash_layers, dash_state
from loradash.distributed import gathered
from safetensors.torch import load_file
from torch import Tensor, nn

from .collectives import Traffic
from .processes import fork
from .schemes import LAUNCH, STEPS, Run, Scheme, batch, mean_over_processes, of_part, scheme

# Before launch and after it.
MOVES = (LAUNCH - 2, LAUNCH + 2)


def seeded(step: int, part: int) -> None:
    """Before a part of a step: all of its dropout masks follow from it."""
    torch.manual_seed(10_000 * step + part)


class Reference(NamedTuple):
    """What one process makes of it: losses of every step, the trained model, its output, and its files."""

    losses: list[float]
    model: nn.Module
    output: Tensor
    adapter: Path
    exported: Path


def reference(way: Scheme, folder: Path) -> Reference:
    """A batch's parts one after the other, their gradients summed as the processes' are averaged."""
    model = way.adapted()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    schedule = DashSchedule(model, progress=False)
    losses = []
    for step in range(STEPS):
        parts = []
        for part in range(way.parts):
            seeded(step, part)
            x, target = (of_part(t, part, way.parts) for t in batch(step))
            loss = way.loss(way.alone(model, x), target) / way.parts
            loss.backward()
            parts.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(sum(parts))
    model.eval()
    with torch.no_grad():
        output = way.alone(model, batch(STEPS)[0])
    model.train()
    exported = folder / "exported"
    # A LoRA's file has no place for trained biases.
    if not way.config.train_bias:
        loradash.export_lora(model, exported)
    return Reference(losses, model, output, loradash.save_adapter(model, folder / "adapter"), exported)


class Cell:
    """Collects comparisons; the worst is its result."""

    def __init__(self) -> None:
        self._found: list[dict[str, Any]] = []

    def compare(self, what: str, ours: Tensor, theirs: Tensor, tolerance: float, relative: bool = True) -> None:
        """The largest difference, relative to theirs' largest element."""
        if ours.shape != theirs.shape:
            raise AssertionError(f"{what}: shape {tuple(ours.shape)}, wanted {tuple(theirs.shape)}")
        scale = theirs.double().abs().max().item() if relative else 1.0
        gap = (ours.double() - theirs.double()).abs().max().item() / (scale or 1.0)
        # NaN is no number that JSON has, and compares as no gap.
        gap = math.inf if math.isnan(gap) else gap
        self._found.append({"compared": what, "gap": gap, "tolerance": tolerance, "error": None})

    def require(self, condition: bool, what: str) -> None:
        if not condition:
            raise AssertionError(what)

    def result(self) -> dict[str, Any]:
        return max(self._found, key=lambda found: found["gap"] / (found["tolerance"] or 1e-30))


class Walk:
    """The cells of one scheme, in an order in which none spoils the next."""

    def __init__(self, way: Scheme, single: Reference, folder: Path) -> None:
        self.way, self.single, self.folder, self.rank = way, single, folder, dist.get_rank()
        self.run: Run | None = None

    def cell(self, name: str) -> dict[str, Any]:
        cell = Cell()
        try:
            getattr(self, name)(cell)
            return cell.result()
        # Whatever it is, the other cells have their turn.
        except Exception as error:
            text = f"{type(error).__name__}: {error}"
            print(f"--- {self.way.name}, {name}\n{traceback.format_exc()}", flush=True)
            return {"compared": name, "gap": math.inf, "tolerance": 0.0, "error": text}

    def trained(self) -> Run:
        if self.run is None:
            raise RuntimeError("not reached: training failed")
        return self.run

    def begin(self) -> Run:
        return self.way.begin(self.way.adapted())

    def steps(self, run: Run, first: int, last: int) -> list[float]:
        losses = []
        for step in range(first, last):
            seeded(step, self.way.part())
            x, target = (of_part(t, self.way.part(), self.way.parts) for t in batch(step))
            losses.append(mean_over_processes(self.way.step(run, x, target)))
        return losses

    def output(self, model: nn.Module) -> Tensor:
        return self.way.forward(model, batch(STEPS)[0])

    def tensors(self, model: nn.Module) -> dict[str, Tensor]:
        """What comes out of training, whole; of directions their projection, which has no signs."""
        found = {}
        with self.way.reading(model):
            for name, layer in dash_layers(self.way.trained(model)).items():
                parts = {key: gathered(getattr(layer, key)).clone() for key in ("lora_a", "lora_b", "dash_sigma")}
                found |= {f"{name}.{key}": t for key, t in parts.items()}
                u, vt = gathered(layer.dash_u), gathered(layer.dash_vt)
                found[f"{name}.directions"] = u @ vt
        return found

    def train(self, cell: Cell) -> None:
        run = self.begin()
        losses = self.steps(run, 0, STEPS)
        self.run = run
        cell.compare(
            "losses", torch.tensor(losses), torch.tensor(self.single.losses), self.way.loss_tolerance, relative=False
        )
        cell.compare("output", self.output(run.model), self.single.output, self.way.tolerance)

    def launch(self, cell: Cell) -> None:
        run = self.trained()
        cell.require(run.schedule.launched, "the schedule did not launch")
        cell.require(dash_state(run.model).step == STEPS, f"step {dash_state(run.model).step}, wanted {STEPS}")
        ours, theirs = self.tensors(run.model), self.tensors_of_one()
        cell.require(ours.keys() == theirs.keys(), f"layers {sorted(ours)}, wanted {sorted(theirs)}")
        for name, tensor in theirs.items():
            cell.compare(name, ours[name], tensor, self.way.tolerance)

    def tensors_of_one(self) -> dict[str, Tensor]:
        found = {}
        for name, layer in dash_layers(self.single.model).items():
            found |= {f"{name}.{key}": getattr(layer, key).detach() for key in ("lora_a", "lora_b", "dash_sigma")}
            found[f"{name}.directions"] = layer.dash_u @ layer.dash_vt
        return found

    def save(self, cell: Cell) -> None:
        run = self.trained()
        with self.way.whole(run.model):
            file = loradash.save_adapter(run.model, self.folder / f"adapter.{self.rank}.safetensors")
        dist.barrier()
        first = load_file(self.folder / "adapter.0.safetensors")
        for name, tensor in load_file(file).items():
            cell.require(torch.equal(tensor, first[name]), f"{name} differs between the processes' files")
        wanted = load_file(self.single.adapter)
        cell.require(first.keys() == wanted.keys(), f"the file has {sorted(first)}, wanted {sorted(wanted)}")
        # A direction's two vectors may have turned their signs together.
        for name, tensor in wanted.items():
            turned = name.endswith(("dash_u", "dash_vt"))
            ours, theirs = (t.float().abs() if turned else t.float() for t in (first[name], tensor))
            cell.compare(name, ours, theirs, self.way.tolerance)

    def load(self, cell: Cell) -> None:
        """Their file in one process, and that of one process here, in a model that never trained."""
        plain = loradash.load_adapter(self.way.network(), self.saved())
        plain.eval()
        with torch.no_grad():
            y = plain(batch(STEPS)[0])
        cell.compare("here to one process", y, self.output(self.trained().model), self.way.tolerance)
        model = self.begin().model
        with self.way.whole(model, writing=True):
            loradash.load_adapter(model, self.single.adapter)
        cell.compare("one process to here", self.output(model), self.single.output, self.way.tolerance)
        cell.require(dash_state(model).step == STEPS, "the step was not loaded")

    def saved(self) -> Path:
        file = self.folder / "adapter.0.safetensors"
        if not file.is_file():
            raise RuntimeError("not reached: saving failed")
        return file

    def export(self, cell: Cell) -> None:
        run = self.trained()
        with self.way.whole(run.model):
            exported = loradash.export_lora(run.model, self.folder / f"exported.{self.rank}")
        ours, theirs = (load_file(folder / "adapter_model.safetensors") for folder in (exported, self.single.exported))
        cell.require(ours.keys() == theirs.keys(), f"the file has {sorted(ours)}, wanted {sorted(theirs)}")
        for name in theirs:
            if name.endswith("lora_A.weight"):
                other = name.replace("lora_A", "lora_B")
                cell.compare(name, ours[other] @ ours[name], theirs[other] @ theirs[name], self.way.tolerance)

    def merge(self, cell: Cell) -> None:
        """Merged the output stays; unmerged it is that of before, bit for bit; disabled it is the base model's."""
        model = self.trained().model
        before = self.output(model)
        with self.way.whole(model, writing=True):
            loradash.merge(model)
        cell.compare("merged", self.output(model), before, self.way.tolerance)
        layers = dash_layers(self.way.trained(model)).values()
        cell.require(all(layer.merged for layer in layers), "a layer was not merged")
        with self.way.whole(model, writing=True):
            loradash.unmerge(model)
        cell.require(torch.equal(self.output(model), before), "unmerge did not bring back what was before")
        with loradash.disable(model), loradash.disable(self.single.model):
            off = self.way.forward(self.single.model, batch(STEPS)[0])
            cell.compare("disabled", self.output(model), off, self.way.tolerance)

    def resume(self, cell: Cell) -> None:
        """Stopped before launch, at it and after it, and gone on with in a model of other adapters."""
        for stop in (LAUNCH - 2, LAUNCH, LAUNCH + 2):
            run = self.begin()
            self.steps(run, 0, stop)
            folder = self.folder / f"checkpoint.{stop}"
            self.way.save_checkpoint(run, folder)
            self.go_on_from(cell, folder, stop)

    def go_on_from(self, cell: Cell, folder: Path, start: int) -> None:
        again = self.begin()
        with torch.no_grad():
            # What is not loaded shows.
            for parameter in filter(lambda p: p.requires_grad, again.model.parameters()):
                parameter.mul_(0.5)
        self.way.load_checkpoint(again, folder)
        step, launched = dash_state(again.model).step, again.schedule.launched
        cell.require(step == start, f"resumed at step {step}, wanted {start}")
        cell.require(launched == (start >= LAUNCH), f"launched is {launched} at step {step}")
        rest = torch.tensor(self.steps(again, start, STEPS))
        wanted = torch.tensor(self.single.losses[start:])
        cell.compare(f"losses from step {start}", rest, wanted, self.way.loss_tolerance, relative=False)
        cell.require(again.schedule.launched, f"resumed at step {start} it never launched")

    def leave(self, cell: Cell) -> None:
        """Leaves checkpoints for other schemes and other numbers of processes."""
        run, losses = self.begin(), []
        for stop in MOVES:
            losses += self.steps(run, len(losses), stop)
            self.way.save_checkpoint(run, self.folder / f"left.{stop}")
        wanted = torch.tensor(self.single.losses[: len(losses)])
        cell.compare("losses", torch.tensor(losses), wanted, self.way.loss_tolerance, relative=False)

    def go_on(self, cell: Cell) -> None:
        """Goes on from what a scheme of two processes left in the same folder."""
        for start in MOVES:
            self.go_on_from(cell, self.folder.parent / "fsdp2_whole" / f"left.{start}", start)

    def cache(self, cell: Cell) -> None:
        """Launches from decompositions on disk: made at the first launch, read at the second."""
        kept = loradash.SpectralCache(self.folder / "spectra")
        for _ in range(2):
            run = self.begin()
            run = run._replace(schedule=DashSchedule(run.model, progress=False, cache=kept))
            self.steps(run, 0, STEPS)
            ours = self.tensors(run.model)
            for name, tensor in self.tensors_of_one().items():
                cell.compare(name, ours[name], tensor, self.way.tolerance)
            files = sorted(file.name for file in kept.folder.iterdir())
            cell.require(len(files) == len(dash_layers(run.model)), f"the cache has {files}")
            kept = loradash.SpectralCache(kept.folder)

    def apart(self, cell: Cell) -> None:
        """What only this scheme has."""
        self.way.look_apart(self.folder)
        cell.compare("told apart", torch.zeros(()), torch.zeros(()), 0.0)

    def traffic(self, cell: Cell) -> None:
        """What a step sends, beside what the frozen model's does under the same scheme, before launch and after it."""
        frozen = self.way.frozen()
        run = self.begin()
        for step in range(STEPS):
            seeded(step, self.way.part())
            x, target = (of_part(t, self.way.part(), self.way.parts) for t in batch(step))
            with Traffic() as base:
                if frozen is not None:
                    frozen(x.requires_grad_()).sum().backward()
            with Traffic() as ours:
                self.way.loss(run.model(x.detach()), target).backward()
                run.optimizer.step()
            run.optimizer.zero_grad()
            run.schedule.step()
            # DDP lays out its buckets after the first step, and says so in the second.
            if step > 1:
                self.way.check_traffic(run.model, base, ours)
        cell.compare("launched", torch.tensor(float(run.schedule.launched)), torch.tensor(1.0), 0.0)


def walk(ways: list[Scheme], cells: dict[str, list[str]], rank: int, folder: Path, processes: int) -> None:
    """What one process does."""
    single = {way.name: reference(way, folder / way.name / f"one.{rank}") for way in ways}
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store.{os.getppid()}",
        rank=rank,
        world_size=processes,
        timeout=timedelta(seconds=120),
    )
    for way in ways:
        way.set_up()
        place = folder / way.name
        steps, results = Walk(way, single[way.name], place), {}
        for cell in cells[way.name]:
            results[cell] = steps.cell(cell)
            (place / f"result.{rank}.json").write_text(json.dumps(results))
    sys.stdout.flush()
    with contextlib.suppress(RuntimeError):
        dist.barrier()


def main(schemes: str, place: str, number: str) -> None:
    cells, folder, processes = json.loads(schemes), Path(place), int(number)
    made = {name: [scheme(name, rank) for rank in range(processes)] for name in cells}
    for name, (way, *_) in made.items():
        if way.processes != processes:
            raise ValueError(f"{name} takes {way.processes} processes, not {processes}")
        (folder / name).mkdir(exist_ok=True)
        way.import_all()
    fork(processes, lambda rank: walk([ways[rank] for ways in made.values()], cells, rank, folder, processes), folder)


if __name__ == "__main__":
    main(*sys.argv[1:])
