"""FSDP1 in two processes, against one."""

from __future__ import annotations

import pytest
from support.scale import CELLS, check


@pytest.mark.slow
@pytest.mark.parametrize("cell", [*CELLS, "cache"])
def test_fsdp1(two, cell):
    check(two[1]["fsdp1"], cell)


@pytest.mark.slow
@pytest.mark.parametrize("cell", ["train", "launch", "save", "load", "resume"])
def test_layers_kept_whole(two, cell):
    """Their weights have names below the adapted layer's."""
    check(two[1]["fsdp1_kept_whole"], cell)


@pytest.mark.slow
def test_flat_parameters_alone_are_refused(two):
    """By FSDP1, when it wraps: use_orig_params=False has no room for frozen and trained parameters in one unit."""
    assert "does not support wrapping such modules when use_orig_params=False" in two[1]["fsdp1_flat"]["train"]["error"]
