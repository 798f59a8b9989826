"""Measures which way of running a call is fastest on this card, and writes the table that may ship with the package.

    python -m benchmarks.proof.tune [--rehearse]

As LORADASH_TUNE=1 does, into a store of its own: the other stages run with what an installation has. measurements.json
is written anew after each shape; laid into loradash_kernels/measurements, it decides the defaults on cards of this kind.
"""

from __future__ import annotations

import argparse
import functools
import os
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks.layers.workloads import LINEARS
from benchmarks.support.measure import COMMIT
from loradash_kernels import dash_linear
from loradash_kernels.backends import cards, registry, tuning
from loradash_kernels.testing import make_case

from .ledger import Row
from .report import MEASUREMENTS
from .state import hash_of
from .worker import LEDGER, Unit, expect, failed, work

RANK, DIRECTIONS, DROPOUT = 16, 8, 0.05
ROWS = (4096, 8192, 1024, 16384)


def ship(path: Path, device: torch.device, driver: str) -> Row:
    """Writes the table of what is in the store, and says what was fastest."""
    # Where git is not there, the sources name the code.
    commit = COMMIT if COMMIT != "unknown" else f"sources {hash_of(['loradash_kernels', 'csrc'])}"
    count = tuning.ship(path, {"card": cards.name_of(device), "driver": driver, "commit": commit})
    return Row("", "measured", detail=f"{count} measurements so far", values={"measurements": count})


def tune_shape(m: int, k: int, n: int, path: Path, driver: str) -> Row:
    """A step of a layer on the card, whose calls are measured as they are made."""
    device, before = torch.device("cuda", 0), len(tuning.MEASURED.known())
    case = make_case(m, k, n, RANK, DIRECTIONS, torch.bfloat16, bias=False, dropout_p=DROPOUT, device=device)
    tensors: dict[str, Any] = dict(case.tensors)
    wanted = [tensors[name].requires_grad_() for name in ("x", "lora_a", "lora_b", "dash_sigma")]
    y = dash_linear(**tensors, scaling=case.scaling, dropout_p=DROPOUT)
    torch.autograd.grad(y, wanted, case.dy)
    if len(tuning.MEASURED.known()) == before:
        return failed("no call was measured: there is one way to run it, or every way failed, see the log")
    return ship(path, device, driver)


def rehearse(path: Path) -> Row:
    """The same steps on the CPU, whose backends have one strategy each: two of them are compared."""
    from tests.support.calls import calls, outputs

    case = make_case(16, 24, 32, 4, 2)
    call = calls(case, outputs(case))[0]
    backends = {backend.name: backend for backend in registry.BACKENDS}
    key = tuning.key("rehearsal", call)
    best = tuning.tune(key, ["cpu", "reference"], lambda name: backends[name].forward(call), device="cpu")
    row = ship(path, torch.device("cpu"), "none")
    tables = tuning.ShippedTables(path.parent)
    found = tables.known().get(key)
    return expect(found is not None and found.fastest == best, f"{best} was faster, {row.detail}", **row.values)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rehearse", action="store_true")
    parser.add_argument("--driver", default="unknown")
    options = parser.parse_args()
    folder = Path(os.environ[LEDGER]).parent / "table"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / MEASUREMENTS
    if options.rehearse:
        return work([("table", functools.partial(rehearse, path))])
    units: list[Unit] = [
        (f"{m}x{k}x{n}", functools.partial(tune_shape, m, k, n, path, options.driver)) for m in ROWS for k, n in LINEARS
    ]
    return work(units)


if __name__ == "__main__":
    sys.exit(main())
