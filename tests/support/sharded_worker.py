"""One of four processes: python -m support.sharded_worker RANK STORE FOLDER

Every check writes what went wrong, or null, into FOLDER/RANK.json.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

from . import sharded_layers, sharded_rules
from .sharded import Meshes

CHECKS: dict[str, Callable[[Meshes, Path], None]] = {
    check.__name__: check for check in (*sharded_rules.CHECKS, *sharded_layers.CHECKS)
}


def main(rank: str, store: str, folder: str) -> None:
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=int(rank), world_size=4, timeout=timedelta(seconds=120)
    )
    meshes, results = Meshes(), {}
    for name, check in CHECKS.items():
        try:
            check(meshes, Path(folder))
            results[name] = None
        # The other checks have their turn.
        except Exception:
            results[name] = traceback.format_exc()
        (Path(folder) / f"{rank}.json").write_text(json.dumps(results))
    dist.barrier()
    sys.stdout.flush()
    # The interpreter's exit now and then aborts in gloo's threads.
    os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
