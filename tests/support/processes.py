"""Programs that run as several gloo processes."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path


def run_processes(
    program: str, folder: Path, *arguments: str, processes: int = 2, seconds: float = 600
) -> Sequence[str]:
    """Runs a program as `processes` processes, with (rank, file of the store, *arguments), until all have ended well.

    Returns what each printed. AssertionError with its errors where one failed.
    """
    # They find this room, as tests do.
    paths = os.pathsep.join(filter(None, (str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": paths}
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", program, str(rank), str(folder / "store"), *arguments],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(processes)
    ]
    said = []
    for worker in workers:
        output, errors = worker.communicate(timeout=seconds)
        assert worker.returncode == 0, errors
        said.append(output)
    return said
