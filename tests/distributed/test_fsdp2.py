"""FSDP2 in two processes, against one."""

from __future__ import annotations

import pytest
from support.scale import CELLS, check, run_schemes


@pytest.fixture(scope="module")
def fsdp2(tmp_path_factory):
    return run_schemes(["fsdp2"], tmp_path_factory.mktemp("fsdp2"))["fsdp2"]


@pytest.mark.slow
@pytest.mark.parametrize("cell", CELLS)
def test_fsdp2(fsdp2, cell):
    check(fsdp2, cell)
