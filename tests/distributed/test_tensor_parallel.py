"""Tensor parallelism in two processes, and with FSDP2 in four, against one."""

from __future__ import annotations

import pytest
from support.scale import CELLS, check, run_schemes


@pytest.fixture(scope="module")
def tp2(tmp_path_factory):
    return run_schemes(["tp2"], tmp_path_factory.mktemp("tp2"))["tp2"]


@pytest.fixture(scope="module")
def tp2_fsdp2(tmp_path_factory):
    return run_schemes(["tp2_fsdp2"], tmp_path_factory.mktemp("tp2_fsdp2"), processes=4)["tp2_fsdp2"]


@pytest.mark.slow
@pytest.mark.parametrize("cell", CELLS)
def test_tensor_parallel(tp2, cell):
    check(tp2, cell)


@pytest.mark.slow
@pytest.mark.parametrize("cell", CELLS)
def test_tensor_parallel_under_fsdp2(tp2_fsdp2, cell):
    check(tp2_fsdp2, cell)
