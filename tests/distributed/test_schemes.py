"""Every scheme in two or four processes, against one. They share a world: starting processes takes longer than what they do,
and all tests of it are in this file, as files are what several workers of pytest share out."""

from __future__ import annotations

import loradash
import pytest
from loradash import dash_state
from support.scale import CELLS, check, run_schemes
from support.schemes import LAUNCH, STEPS
from support.single import begin, steps

SHORT = ("train", "launch")
WHOLE = (*CELLS, "cache")
KEPT_WHOLE = ("train", "launch", "save", "load", "resume")
DDP = ("ddp_static", "ddp_view", "ddp_unused", "ddp_no_sync")
FSDP2 = (
    "fsdp2_layers",
    "fsdp2_kept",
    "fsdp2_bf16",
    "fsdp2_half",
    "fsdp2_offloaded",
    "fsdp2_not_offloaded",
    "fsdp2_checkpointed",
    "fsdp2_wrapped",
)
TWO = {
    # A step sends the gradients of what trains, and nothing else (traffic).
    "ddp": (*WHOLE, "traffic"),
    **dict.fromkeys(DDP, SHORT),
    "fsdp1": WHOLE,
    # Weights of layers kept whole have names below the adapted layer's, which pre-launch asks for its products.
    "fsdp1_kept_whole": KEPT_WHOLE,
    # A step gathers as often as the frozen model's, and reduces the gradients of what trains (traffic).
    "fsdp2": (*WHOLE, "traffic"),
    **dict.fromkeys(FSDP2, SHORT),
    # A root that stays gathered. Trained biases have no place in a LoRA's file.
    "fsdp2_root": tuple(cell for cell in CELLS if cell != "export"),
    "fsdp2_kept_whole": KEPT_WHOLE,
    # Checkpoints for others to go on from.
    "fsdp2_whole": ("leave",),
    "tp2": CELLS,
}
REFUSED = {"fsdp1_flat": ("train",)}
FOUR = {"tp2_fsdp2": CELLS, "fsdp2_four": ("go_on",), "ddp_four": ("go_on",)}


def pairs(walks):
    """(scheme, cell) of all."""
    return [(scheme, cell) for scheme, cells in walks.items() for cell in cells]


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """(folder, results by scheme and cell)."""
    folder = tmp_path_factory.mktemp("two")
    return folder, run_schemes({**TWO, **REFUSED}, folder)


@pytest.fixture(scope="module")
def four(two):
    """In the same folder: they go on from what two processes left."""
    return run_schemes(FOUR, two[0], processes=4)


@pytest.mark.slow
@pytest.mark.parametrize(("scheme", "cell"), pairs(TWO))
def test_two_processes(two, scheme, cell):
    check(two[1][scheme], cell)


@pytest.mark.slow
@pytest.mark.parametrize(("scheme", "cell"), pairs(FOUR))
def test_four_processes(four, scheme, cell):
    check(four[scheme], cell)


@pytest.mark.slow
def test_flat_parameters_alone_are_refused(two):
    """By FSDP1, when it wraps: use_orig_params=False has no room for frozen and trained parameters in one unit."""
    assert "does not support wrapping such modules when use_orig_params=False" in two[1]["fsdp1_flat"]["train"]["error"]


@pytest.mark.slow
@pytest.mark.parametrize("start", [LAUNCH - 2, LAUNCH + 2])
def test_from_two_processes_to_one(two, start):
    run = begin()
    loradash.load_training(two[0] / "fsdp2_whole" / f"left.{start}", *run)
    assert dash_state(run[0]).step == start and run[2].launched == (start > LAUNCH)
    assert steps(run, start, STEPS) == pytest.approx(steps(begin(), 0, STEPS)[start:], abs=1e-5)
