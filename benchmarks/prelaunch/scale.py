"""How much faster do two processes pre-launch than one, and what does decomposing in the background cost a training step?

    OMP_NUM_THREADS=1 python -m benchmarks.prelaunch.scale [--rounds 3] [--out benchmarks/results]

Wants two cores that nothing else uses, for about a minute a round. Processes have one thread each.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import loradash
import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from benchmarks.support.measure import environment, write_csv

# How the workers are started, from the same folder as this.
NAME = "benchmarks.prelaunch.scale"


def model(width: int = 1024, squares: int = 6, wide: int = 2) -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Linear(width, width) for _ in range(squares)] + [nn.Linear(width // 2, 2 * width) for _ in range(wide)]
    adapted = loradash.apply_dash(nn.ModuleList(layers), loradash.DashConfig(r=8))
    for layer in loradash.dash_layers(adapted).values():
        nn.init.normal_(layer.lora_b, std=0.01)
    return adapted


def worker(rank: int, world: int, store: str) -> None:
    """One of `world` processes; the first prints the median time of a launch."""
    if world > 1:
        torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    times = []
    for _ in range(5):
        fresh = model()
        if world > 1:
            torch.distributed.barrier()
        start = time.perf_counter()
        loradash.prelaunch(fresh, progress=False)
        times.append(time.perf_counter() - start)
    if rank == 0:
        print(statistics.median(times[1:]), flush=True)
    if world > 1:
        torch.distributed.barrier()
    # gloo's threads now and then abort the interpreter's exit.
    os._exit(0)


def launch_time(world: int) -> float:
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", NAME, "--worker", str(world), str(Path(folder) / "store")]
        processes = [
            subprocess.Popen([*command, str(rank)], stdout=subprocess.PIPE, text=True, env=variables)
            for rank in range(world)
        ]
        printed = [process.communicate()[0] for process in processes]
    return float(printed[0])


def step_times(adapted: nn.Module, seconds: float) -> list[float]:
    """The seconds of training steps of the six square layers in a row, 512 tokens, taken for about so long."""
    layers = [layer for layer in loradash.dash_layers(adapted).values() if layer.in_features == layer.out_features]
    net = nn.Sequential(*layers)
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=1e-4)
    x = torch.randn(512, layers[0].in_features)
    times = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        optimizer.zero_grad()
        net(x).square().mean().backward()
        optimizer.step()
        times.append(time.perf_counter() - start)
    return times


def background_rise(seconds: float) -> tuple[float, int]:
    """Median step time with a decomposition running over that without, in turns; and the weights decomposed meanwhile."""
    quiet, busy, decomposed = [], [], 0
    adapted = model()
    step_times(adapted, 1.0)
    weights = nn.ModuleList([nn.Linear(2048, 2048) for _ in range(8)])
    source = loradash.apply_dash(weights, loradash.DashConfig(r=2))
    for _ in range(3):
        quiet += step_times(adapted, seconds)
        with tempfile.TemporaryDirectory() as folder:
            cache = loradash.SpectralCache(folder)
            running = cache.start(source)
            # The process has started when it has finished its first weight.
            while not cache.size():
                time.sleep(0.05)
            busy += step_times(adapted, seconds)
            if running.remaining == 0:
                raise RuntimeError("the decomposition ended before the measurement: give it more weights")
            decomposed += 8 - running.remaining
            running.cancel()
    return statistics.median(busy) / statistics.median(quiet), decomposed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--worker", nargs=3, metavar=("WORLD", "STORE", "RANK"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.worker:
        world, store, rank = options.worker
        worker(int(rank), int(world), store)
    rows: list[dict[str, Any]] = []
    for number in range(options.rounds):
        one, two = launch_time(1), launch_time(2)
        rise, decomposed = background_rise(1.0)
        rows.append(
            {
                "round": number + 1,
                "one process / two": one / two,
                "step with background / without": rise,
                "weights of 2048 x 2048 decomposed": decomposed,
            }
        )
    table = Table(*rows[0], title="pre-launch beside other work")
    for row in rows:
        table.add_row(*(f"{v:.3f}" if isinstance(v, float) else str(v) for v in row.values()))
    console = Console(width=120)
    console.print(table)
    console.print(environment())
    if options.out:
        write_csv(options.out / "prelaunch_scale.csv", rows)


if __name__ == "__main__":
    main()
