"""The parent of four processes that walk the checks: main(RANK, STORE, FOLDER), RANK being 0.

Every check writes what went wrong, or null, into FOLDER/RANK.json of each process.
"""

from __future__ import annotations

import json
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from . import processes, sharded_layers, sharded_rules
from .sharded import Meshes

CHECKS: dict[str, Callable[[Meshes, Path], None]] = {
    check.__name__: check for check in (*sharded_rules.CHECKS, *sharded_layers.CHECKS)
}


def main(rank: str, store: str, folder: str) -> None:
    with torch.no_grad():
        # Brings in what the compiler imports when it is first used.
        torch.compile(torch.sin, backend="aot_eager")(torch.zeros(1))
    processes.fork(4, lambda rank: walk(rank, store, Path(folder)), Path(folder))


def walk(rank: int, store: str, folder: Path) -> None:
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=4, timeout=timedelta(seconds=120)
    )
    meshes, results = Meshes(), {}
    for name, check in CHECKS.items():
        try:
            check(meshes, folder)
            results[name] = None
        # The other checks have their turn.
        except Exception:
            results[name] = traceback.format_exc()
        (folder / f"{rank}.json").write_text(json.dumps(results))
    dist.barrier()
