"""Constants and pure functions that every backend shares."""

from __future__ import annotations

from dataclasses import dataclass

import torch

PHILOX_STEPS = 65536
"""Dropout probabilities are multiples of 1 / 65536: 16 random bits an element."""


def dropout_threshold(p: float) -> int:
    """The 16-bit threshold below which an element is dropped. `p` is a probability in [0, 1); ValueError otherwise."""
    if not 0.0 <= p < 1.0:
        raise ValueError(f"dropout_p must be in [0, 1), got {p}")
    return min(round(p * PHILOX_STEPS), PHILOX_STEPS - 1)


def keep_scale(threshold: int) -> float:
    """1 / (1 - p) for the p that the threshold stands for."""
    return PHILOX_STEPS / (PHILOX_STEPS - threshold)


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums, of P and of gradients before they are rounded: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def draw_seed(device: torch.device | str = "cpu") -> torch.Tensor:
    """(2,) int64: the key of Philox and the offset of its counter, 63 random bits each, from torch's generator."""
    if torch.compiler.is_compiling():  # which knows no in-place draws
        return torch.randint(0, 2**63 - 1, (2,), dtype=torch.int64, device=device)
    return torch.empty(2, dtype=torch.int64, device=device).random_()


@dataclass(frozen=True)
class TileConfig:
    """How a kernel cuts its product: tiles of block_m x block_n, block_k deep; group_m rows of tiles share L2."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    group_m: int = 8
    tight: bool = False  # takes every register: for depths that block_k divides and for R <= 64

    def shared_bytes(self, itemsize: int) -> int:
        """Shared memory of the operands in flight, as a planning figure: num_stages of both."""
        return self.num_stages * (self.block_m + self.block_n) * self.block_k * itemsize


@dataclass(frozen=True)
class Target:
    """What a GPU architecture offers: the most shared memory a block may take, and processors to fill (those of the
    largest common card, until a running device's own count replaces it)."""

    name: str
    shared_limit: int
    processors: int
    warp_size: int = 32
    matrix_instruction: str = "HMMA"
    tf32: bool = True  # do matrix instructions take float32 rounded to TF32?

    @property
    def asynchronous(self) -> bool:
        """Do matrix instructions run beside the program, which waits for them? Those cards copy by descriptors too."""
        return self.matrix_instruction in ("HGMMA", "UTCHMMA")
