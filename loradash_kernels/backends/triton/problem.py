"""The vocabulary of a plan: the problem that a call poses, how it may be solved, and a launch as data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...random import keep_scale
from .target import Target, TileConfig


@dataclass(frozen=True)
class Launch:
    """One kernel launch."""

    kernel: Any
    grid: tuple[int, ...]
    args: dict[str, Any]
    constants: dict[str, Any]
    num_warps: int = 4
    num_stages: int = 1

    def run(self) -> None:
        self.kernel[self.grid](**self.args, **self.constants, num_warps=self.num_warps, num_stages=self.num_stages)


@dataclass(frozen=True)
class LibraryProduct:
    """A product left to the vendor's library: out = a b^T + bias, or a b."""

    a: Tensor
    b: Tensor
    bias: Tensor | None
    out: Tensor
    transposed: bool

    def run(self) -> None:
        b = self.b.t() if self.transposed else self.b
        if self.bias is None:
            torch.mm(self.a, b, out=self.out)
        else:
            torch.addmm(self.bias, self.a, b, out=self.out)


@dataclass(frozen=True)
class Strategy:
    """How a product is computed: "fused", "descriptors" (the same, persistent, on tensor descriptors where these can read the
    operands), "one_launch" (forward only) or "library" (the vendor's product with our low-rank kernels); and the tile,
    where it is not the table's.
    """

    kind: str = "fused"
    tile: TileConfig | None = None


@dataclass
class Problem:
    """What every launch of a call needs to know."""

    x: Tensor
    weight: Tensor | None
    lora_a: Tensor
    lora_b: Tensor
    dash_u: Tensor | None
    dash_vt: Tensor | None
    dash_sigma: Tensor | None
    seed: Tensor | None
    scaling: float
    threshold: int
    target: Target
    tf32: bool = False

    def __post_init__(self) -> None:
        self.m, self.k = self.x.shape
        self.n, self.rank = self.lora_b.shape
        self.directions = 0 if self.dash_sigma is None else self.dash_sigma.shape[0]
        self.width = self.rank + self.directions
        self.r_block = power_of_two(self.width)
        self.rank_block = power_of_two(self.rank)
        self.itemsize = self.x.element_size()
        self.dropout = self.threshold > 0 and self.seed is not None
        self.keep_scale = keep_scale(self.threshold if self.dropout else 0)
        if self.dash_sigma is not None:
            self.dash_sigma = self.dash_sigma.contiguous()

    @property
    def precision(self) -> str:
        return "tf32" if self.tf32 and self.target.tf32 else "ieee"

    def adapter_args(self, names: str) -> dict[str, Any]:
        """Pointers and strides of the adapters named by their letters: a, b, u, v."""
        tensors = {
            "a": ("lora_a", self.lora_a, "r", "k"), "b": ("lora_b", self.lora_b, "n", "r"),
            "u": ("dash_u", self.dash_u, "n", "s"), "v": ("dash_vt", self.dash_vt, "s", "k"),
        }  # fmt: skip
        args: dict[str, Any] = {}
        for letter in names:
            name, tensor, first, second = tensors[letter]
            present = tensor is not None and (self.directions > 0 or letter in "ab")
            args[name] = tensor if present else None
            strides = tensor.stride() if present and tensor is not None else (0, 0)
            args[f"stride_{letter}{first}"], args[f"stride_{letter}{second}"] = strides
        return args

    def sigma(self) -> Tensor | None:
        return self.dash_sigma if self.directions else None

    def empty(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Workspace on the device of x."""
        return self.x.new_empty(shape, dtype=dtype or self.x.dtype)


def descriptors_fit(q: Problem, *operands: Tensor | None) -> bool:
    """Can these be read through tensor descriptors: on this card, aligned rows of 16-bit elements, not empty?"""
    return (
        q.target.asynchronous
        and q.itemsize == 2
        and all(
            t is not None and t.numel() > 0 and t.stride(1) == 1 and t.data_ptr() % 16 == 0
            and t.stride(0) >= t.shape[1] and t.stride(0) * q.itemsize % 16 == 0
            for t in operands
        )
    )  # fmt: skip


def descriptor(t: Tensor, *block: int) -> Any:
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor(t, list(t.shape), list(t.stride()), list(block))


def tile_count(size: int, block: int) -> int:
    return -(-size // block)


def round_up(size: int, block: int) -> int:
    return tile_count(size, block) * block


def power_of_two(size: int) -> int:
    """At least 16: the smallest side of a matrix instruction."""
    return max(16, 1 << max(size - 1, 0).bit_length())


def wide(*operands: Any) -> bool:
    """Do offsets inside a tile need 64 bits? Tiles are at most 256 long in each direction."""
    return any(abs(s) * 512 >= 2**31 for t in operands if isinstance(t, Tensor) for s in t.stride())
