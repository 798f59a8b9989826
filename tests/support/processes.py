"""Programs that run as several gloo processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Sequence
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


def fork(processes: int, program: Callable[[int], None], folder: Path) -> None:
    """program(rank) in processes that are forked from this one, which has imported for all of them: that takes longer than most
    of what they do. It must not have run a backward pass, after which autograd does not fork.

    What process `rank` prints goes to FOLDER/output.RANK. Where one fails the others, which would wait for it, are ended:
    RuntimeError with the end of what it printed.
    """
    sys.stdout.flush()
    children = {_forked(rank, program, folder / f"output.{rank}"): rank for rank in range(processes)}
    while children:
        ended, status = os.wait()
        rank = children.pop(ended)
        if status:
            for child in children:
                os.kill(child, signal.SIGKILL)
            said = (folder / f"output.{rank}").read_text()[-2000:]
            raise RuntimeError(f"process {rank} of {processes} failed: {said}")


def _forked(rank: int, program: Callable[[int], None], output: Path) -> int:
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, 1)
        os.dup2(file, 2)
        program(rank)
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        # The interpreter's exit now and then aborts in gloo's threads.
        os._exit(status)
