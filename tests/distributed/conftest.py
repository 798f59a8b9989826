"""The schemes of two processes in one world: starting processes takes longer than what they do."""

from __future__ import annotations

import pytest
from support.scale import CELLS, run_schemes

SHORT = ("train", "launch")
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
WHOLE = (*CELLS, "cache")
WALKS = {
    "ddp": (*WHOLE, "traffic"),
    **dict.fromkeys(DDP, SHORT),
    "fsdp1": WHOLE,
    "fsdp1_kept_whole": ("train", "launch", "save", "load", "resume"),
    "fsdp1_flat": ("train",),
    "fsdp2": (*WHOLE, "traffic"),
    **dict.fromkeys(FSDP2, SHORT),
    # Trained biases have no place in a LoRA's file.
    "fsdp2_root": tuple(cell for cell in CELLS if cell != "export"),
    "fsdp2_kept_whole": ("train", "launch", "save", "load", "resume"),
    "fsdp2_whole": ("leave",),
}


@pytest.fixture(scope="session")
def two(tmp_path_factory):
    """(folder, results by scheme and cell)."""
    folder = tmp_path_factory.mktemp("two")
    return folder, run_schemes(WALKS, folder)
