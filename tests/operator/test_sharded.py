"""DTensors as arguments, and layers divided by ColwiseDash and RowwiseDash, in four processes against one."""

from __future__ import annotations

import json

import pytest
from support.processes import run_processes
from support.sharded_worker import CHECKS

WORKER = "import sys; from support.sharded_worker import main; main(*sys.argv[1:])"


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What went wrong in every process, by check."""
    folder = tmp_path_factory.mktemp("sharded")
    run_processes(WORKER, folder, str(folder), processes=1)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(4)]


@pytest.mark.slow
@pytest.mark.parametrize("check", CHECKS)
def test_sharded(found, check):
    errors = [of[check] for of in found]
    assert errors == [None] * 4, "\n".join(filter(None, errors))
