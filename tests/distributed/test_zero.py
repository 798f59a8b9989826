"""DeepSpeed's ZeRO, stages 2 and 3, in two processes, against one."""

from __future__ import annotations

import importlib.util
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest
from support.processes import run_processes
from support.scale import CELLS, check, run_schemes

# Imported in processes of their own alone.
pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None,
    reason="needs deepspeed: DS_BUILD_OPS=0 pip install --no-build-isolation deepspeed==0.19.8",
)

STAGES = ("zero2", "zero3")
# Experts are those of transformers 5.
try:
    EXPERTS = ("zero3_experts",) if version("transformers").split(".")[0] >= "5" else ()
except PackageNotFoundError:
    EXPERTS = ()
WORKER = Path(__file__).parents[1] / "support" / "zero_worker.py"


@pytest.fixture(scope="module")
def zero(tmp_path_factory):
    return run_schemes([*STAGES, *EXPERTS], tmp_path_factory.mktemp("zero"))


@pytest.mark.slow
@pytest.mark.parametrize("stage", [*STAGES, *EXPERTS])
@pytest.mark.parametrize("cell", CELLS)
def test_zero(zero, stage, cell):
    check(zero[stage], cell)


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_what_zero_keeps_apart(tmp_path, stage):
    """Its own copies of parameters, and what cannot be right under it, each in words before training starts."""
    said = run_processes(WORKER.read_text(), tmp_path, stage)
    assert all(text.strip().endswith("done") for text in said), said
