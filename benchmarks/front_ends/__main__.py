"""What a training step costs through every front end: a small LLaMA under transformers' Trainer, one thread, one run.

    OMP_NUM_THREADS=1 python -m benchmarks.front_ends [--seconds 45] [--rehearse] [--out benchmarks/results]

Arms (`arms.py`): the frozen model, in which one vector trains that stands before all layers; PEFT LoRA as it comes, with its
adapters in the model's dtype, and accelerated; the authors' LoRA-Dash; and ours, by apply_dash and through PEFT. LoRA-Dash
stands before launch and after it. All arms have the same weights, see the same batches and pass back through all layers.

First the arms are checked against each other (`checks.py`); where one is wrong nothing is timed, and the exit status is 1. So
it is where the accelerator gave way in a call that was timed.
Then every arm's Trainer goes on by one step in turn, in rounds of random order (`training.py`), which takes --seconds for each
model; medians, and ratios within the run, are what to quote. Memory is measured in a process for each arm (`memory.py`).
Beside the ratios stands what they were modelled to be (`modelled.py`). Written are front_ends.csv, .md and .png.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import gc
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.layers.variants import RANK
from benchmarks.support.measure import write_csv
from loradash_kernels.timing import HostStopwatch, Samples, measure

from . import modelled, report
from .arms import ARMS, FROZEN, Arm, arms_for, build, callbacks_of
from .checks import RedCheck, check_arms, check_fused
from .memory import memory_of
from .models import DTYPES, Sizes
from .training import TrainerRun, one_arena

MODELS = (Sizes(512, 1376, layers=4, batch=2, tokens=256), Sizes(1024, 2752, layers=2, batch=2, tokens=256))
REHEARSED = (Sizes(64, 128, layers=2, batch=1, tokens=16),)
WARM, LEAST, MOST = 2, 5, 60


@dataclass
class Times:
    """What the steps of an arm took: wall time, and seconds of the processor, which other programs hardly change."""

    wall: Samples
    processor: list[float]

    @property
    def processor_milliseconds(self) -> float:
        return 1e3 * statistics.median(self.processor)


def timed(arms: Sequence[Arm], sizes: Sizes, seconds: float, folder: Path) -> dict[str, Times]:
    """Steps of all arms in turn, for about so many seconds."""
    try:
        return _timed(arms, sizes, seconds, folder)
    finally:
        # A Trainer and its model hold each other.
        gc.collect()


def _timed(arms: Sequence[Arm], sizes: Sizes, seconds: float, folder: Path) -> dict[str, Times]:
    processor: dict[str, list[float]] = {arm.name: [] for arm in arms}

    def call(name: str, run: TrainerRun) -> None:
        start = time.process_time()
        run.step()
        processor[name].append(time.process_time() - start)

    with contextlib.ExitStack() as stack:
        steps, models = {}, {arm: build(arm, sizes) for arm in arms}
        for arm, model in models.items():
            run = stack.enter_context(TrainerRun(model, sizes, folder, callbacks_of(arm)))
            steps[arm.name] = functools.partial(call, arm.name, run)
        wall = measure(steps, stopwatch=HostStopwatch(), warm=WARM, least=LEAST, most=MOST, seconds=seconds)
        # What is timed is of other sizes than what was checked before, and drops.
        for arm, model in models.items():
            check_fused(arm, model, len(processor[arm.name]))
    return {name: Times(wall[name], found[WARM:]) for name, found in processor.items()}


def row_of(arm: Arm, sizes: Sizes, times: dict[str, Times], distance: float) -> dict[str, Any]:
    found, frozen = times[arm.name], times[FROZEN]
    work = modelled.flops(arm.kind, sizes, arm.directions) / modelled.flops(modelled.FROZEN, sizes)
    moved = modelled.elements(arm.kind, sizes, arm.directions) / modelled.elements(modelled.FROZEN, sizes)
    return {
        "dtype": sizes.dtype,
        "hidden": sizes.hidden,
        "layers": sizes.layers,
        "rows": sizes.rows,
        "r": RANK,
        "arm": arm.name,
        "step ms": found.wall.median,
        "ratio": found.wall.median / frozen.wall.median,
        "processor ratio": found.processor_milliseconds / frozen.processor_milliseconds,
        "spread": found.wall.spread,
        "steps": len(found.wall.milliseconds),
        "modelled FLOPs": work,
        "modelled bytes": moved,
        "loss distance": distance,
    }


def run(models: Sequence[Sizes], names: Sequence[str], seconds: float) -> list[dict[str, Any]]:
    """A row for every arm of every model. Raises RedCheck before any time is taken, or where one was taken of the wrong way."""
    arms = {sizes: arms_for(sizes, names) for sizes in models}
    rows = []
    with tempfile.TemporaryDirectory() as path:
        folder = Path(path)
        distances = {
            sizes: check_arms(chosen, sizes, folder)
            for sizes, chosen in tqdm(arms.items(), desc="checks", file=sys.stderr)
        }
        for sizes, chosen in tqdm(arms.items(), desc="step times", file=sys.stderr):
            times = timed(chosen, sizes, seconds, folder)
            rows += [row_of(arm, sizes, times, distances[sizes].get(arm.name, 0.0)) for arm in chosen]
    # Memory is a matter of sizes alone: it is told for the widest model.
    widest = max(sizes.hidden for sizes in models)
    cases = [(arm, sizes) for sizes, chosen in arms.items() if sizes.hidden == widest for arm in chosen]
    found = {
        (arm.name, sizes.dtype): memory_of(arm, sizes) for arm, sizes in tqdm(cases, desc="memory", file=sys.stderr)
    }
    empty = dict.fromkeys(report.MEASURES, "")
    return [{**row, **(found[row["arm"], row["dtype"]] if row["hidden"] == widest else empty)} for row in rows]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.front_ends", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=45, help="of timing, for each of the models (default 45)")
    parser.add_argument("--rehearse", action="store_true", help="a tiny model: the times mean nothing")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=[*ARMS], metavar="ARM", help="some of the arms")
    parser.add_argument("--out", type=Path, help="folder for front_ends.csv, front_ends.md and front_ends.png")
    options = parser.parse_args(arguments)
    if options.seconds <= 0:
        parser.error(f"--seconds must be positive, got {options.seconds}")
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)
    # The arms that stand before launch never come to it.
    warnings.filterwarnings("ignore", "loradash: training ended at step")
    one_arena()
    # A Trainer collects garbage when it starts, and there are many: what the libraries hold need not be looked through.
    gc.freeze()
    models = [replace(sizes, dtype=dtype) for dtype in DTYPES for sizes in (REHEARSED if options.rehearse else MODELS)]
    try:
        rows = run(models, options.arms, options.seconds)
    except RedCheck as error:
        print(f"no times are given: {error}", file=sys.stderr)
        return 1
    report.show(rows)
    if options.out:
        write_csv(options.out / "front_ends.csv", rows)
        report.write(rows, options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
