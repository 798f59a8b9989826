"""DistributedDataParallel in two processes, against one."""

from __future__ import annotations

import pytest
from support.scale import CELLS, check, run_schemes


@pytest.fixture(scope="module")
def ddp(tmp_path_factory):
    return run_schemes(["ddp"], tmp_path_factory.mktemp("ddp"))["ddp"]


@pytest.mark.slow
@pytest.mark.parametrize("cell", CELLS)
def test_ddp(ddp, cell):
    check(ddp, cell)
