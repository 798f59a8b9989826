"""What a kernel is planned for: the tile of a product, and the GPU architecture that runs it."""

from __future__ import annotations

import functools
from dataclasses import dataclass

Version = tuple[int, int]
MINIMUM: Version = (3, 3)
"""The first Triton whose compiler was seen to take kernels of every kind, and whose interpreter runs them."""
DESCRIPTORS: Version = (3, 4)
"""The first Triton whose programs are given tensor descriptors by the host."""
FENCED: Version = (3, 7)
"""The first Triton that puts a fence between what cp.async copied to shared memory and the wgmma that reads it."""


@functools.cache
def triton_version() -> Version:
    import triton

    major, minor = triton.__version__.split(".")[:2]
    return int(major), int(minor)


@dataclass(frozen=True)
class TileConfig:
    """How a kernel cuts its product: tiles of block_m x block_n, block_k deep; group_m rows of tiles share L2."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    group_m: int = 8
    # A tight tile takes every register: it is for depths that block_k divides and for R <= 64.
    tight: bool = False

    def constants(self) -> dict[str, int]:
        """What the kernel of a product is compiled with."""
        return {
            "BLOCK_M": self.block_m,
            "BLOCK_N": self.block_n,
            "BLOCK_K": self.block_k,
            "GROUP_M": self.group_m,
        }

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
    # Do matrix instructions take float32 rounded to TF32?
    tf32: bool = True
    # The first Triton whose assembler knows the architecture.
    triton: Version = MINIMUM

    @property
    def asynchronous(self) -> bool:
        """Do matrix instructions run beside the program, which waits for them? Those cards copy by descriptors too."""
        return self.matrix_instruction in ("HGMMA", "UTCHMMA")

    @property
    def copies_ahead(self) -> bool:
        """May a kernel copy the next tiles by cp.async while it multiplies, with the Triton that is installed?

        Asynchronous matrix instructions read shared memory through another proxy than cp.async writes it: without a fence
        between the two, which PTX asks for, they may read what was there before.
        """
        return not self.asynchronous or triton_version() >= FENCED

    @property
    def descriptors(self) -> bool:
        """Can kernels here copy by tensor descriptors, with the Triton that is installed?"""
        return self.asynchronous and triton_version() >= DESCRIPTORS
