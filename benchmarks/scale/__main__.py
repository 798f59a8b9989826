"""Every way of training in several processes, held against one process, and what a step of each sends.

    OMP_NUM_THREADS=1 python -m benchmarks.scale [--schemes ddp,fsdp2] [--out benchmarks/results]

Gloo processes on this machine: figures are gaps and bytes, no times. The cells are those of tests/distributed
(tests/support/scale_worker.py says what each compares); bytes are counted by `traffic.py` beside what `modelled.py` expects.
ZeRO needs deepspeed. Exit status 1 where a cell is not as in one process.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks.support.measure import environment, write_csv
from tests.support.scale import CELLS, TESTS, badness, run_schemes

from . import report

ROOT = Path(__file__).parents[2]
PROCESSES = {"ddp": 2, "fsdp1": 2, "fsdp2": 2, "tp2": 2, "tp2_fsdp2": 4, "zero2": 2, "zero3": 2}


def missing(scheme: str) -> str | None:
    """Why a scheme cannot run here."""
    if scheme.startswith("zero") and importlib.util.find_spec("deepspeed") is None:
        return "deepspeed is not installed"
    return None


def traffic(scheme: str, folder: Path) -> dict[str, Any]:
    """What `traffic.py` counts. RuntimeError with its last words where a process failed."""
    file, store, processes = folder / "traffic.json", folder / "traffic.store", PROCESSES[scheme]
    paths = [str(TESTS), str(ROOT), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    program = [sys.executable, "-m", "benchmarks.scale.traffic", scheme]
    outputs = [folder / f"traffic.{rank}" for rank in range(processes)]
    workers = []
    for rank, output in enumerate(outputs):
        with output.open("w") as said:
            arguments = [*program, str(rank), str(store), str(file)]
            workers.append(subprocess.Popen(arguments, env=environment, stdout=said, stderr=subprocess.STDOUT))
    try:
        for worker, output in zip(workers, outputs, strict=True):
            if worker.wait(timeout=300) != 0:
                raise RuntimeError(f"{scheme}: {output.read_text()[-2000:]}")
    finally:
        for worker in workers:
            worker.kill()
    return json.loads(file.read_text())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--schemes", default=",".join(PROCESSES), help="some of them, by commas")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    schemes = options.schemes.split(",")
    unknown = [scheme for scheme in schemes if scheme not in PROCESSES]
    if unknown:
        parser.error(f"--schemes {','.join(unknown)}: there are {', '.join(PROCESSES)}")
    cells: dict[str, Any] = {}
    counts: dict[str, Any] = {}
    left_out = {scheme: why for scheme in schemes if (why := missing(scheme))}
    with tempfile.TemporaryDirectory() as folder, tqdm(total=2 * (len(schemes) - len(left_out))) as bar:
        for scheme in schemes:
            if scheme in left_out:
                continue
            place, processes = Path(folder) / scheme, PROCESSES[scheme]
            bar.set_description(f"{scheme}, cells")
            cells |= run_schemes([scheme], place, processes=processes, seconds=600)
            bar.update()
            bar.set_description(f"{scheme}, bytes")
            counts[scheme] = traffic(scheme, place)
            bar.update()
    text = report.page(cells, counts, left_out, environment())
    print(text)
    if options.out:
        write_csv(options.out / "scale.csv", report.rows(cells, counts))
        (options.out / "scale.md").write_text(text)
    failed = [f"{scheme} {cell}" for scheme, found in cells.items() for cell in CELLS if badness(found[cell]) > 1]
    if failed:
        print(f"not as in one process: {', '.join(failed)}", file=sys.stderr)
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
