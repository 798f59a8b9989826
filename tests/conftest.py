"""Common fixtures: one seed, every backend that can run here, and real LoRA factors where there are any."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from loradash_kernels import available_backends
from loradash_kernels.backends.triton import backend as triton_backend

if triton_backend.interpreted():
    from support.interpreter import repair

    repair()

# Pre-launch selection is judged on real LoRA factors, which are no part of the repository: LORADASH_FACTORS names a file of
# them, by default one in a folder shared/ beside the checkout, which CI lays there; without a file these tests are skipped.
KEPT_FACTORS = Path(__file__).parents[2] / "shared" / "data" / "minilm_boolq_lora_r8_step100.safetensors"
FACTORS = Path(os.environ.get("LORADASH_FACTORS", KEPT_FACTORS))


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(params=[name for name, reason in available_backends().items() if reason is None])
def backend(request):
    """Every backend that can run here."""
    return request.param


@pytest.fixture
def factors():
    """A file of LoRA factors that were trained on all-MiniLM-L6-v2."""
    if not FACTORS.is_file():
        pytest.skip(f"real LoRA factors are not at {FACTORS}; set LORADASH_FACTORS to a file of them")
    return FACTORS
