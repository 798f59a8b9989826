"""DeepSpeed's ZeRO, stages 1 to 3, in two processes, against one."""

from __future__ import annotations

import contextlib
import importlib.util
from importlib.metadata import PackageNotFoundError, version

import pytest
from support.scale import CELLS, check, run_schemes

# Imported in processes of their own alone.
pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None,
    reason="needs deepspeed: DS_BUILD_OPS=0 pip install --no-build-isolation deepspeed==0.19.8",
)

# What only ZeRO has (apart): its own copies of parameters, and refusals before training starts.
CELLS_OF_ZERO = (*CELLS, "apart")
WALKS = {"zero1": CELLS, "zero2": CELLS_OF_ZERO, "zero3": (*CELLS_OF_ZERO, "cache")}
# Experts are those of transformers 5.
with contextlib.suppress(PackageNotFoundError):
    if version("transformers").split(".")[0] >= "5":
        WALKS["zero3_experts"] = CELLS


@pytest.fixture(scope="module")
def zero(tmp_path_factory):
    return run_schemes(WALKS, tmp_path_factory.mktemp("zero"))


@pytest.mark.slow
@pytest.mark.parametrize(("scheme", "cell"), [(scheme, cell) for scheme, cells in WALKS.items() for cell in cells])
def test_zero(zero, scheme, cell):
    check(zero[scheme], cell)
