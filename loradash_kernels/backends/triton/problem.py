"""The vocabulary of a plan: the problem that a call poses, and what solves it, as data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from ...calls import BackwardCall, ForwardCall
from ...random import keep_scale
from .target import Target, TileConfig


@dataclass(frozen=True)
class KernelLaunch:
    """A kernel, its grid, and its arguments by name: those of run time and those that are compiled in."""

    kernel: Any
    grid: tuple[int, ...]
    args: dict[str, Any]
    constants: dict[str, Any]
    num_warps: int = 4
    num_stages: int = 1

    def run(self) -> Any:
        """By Triton; gives the compiled kernel, or None in its interpreter."""
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages}
        return self.kernel[self.grid](**self.args, **self.constants, **options)


def multiply(a: Tensor, b: Tensor, bias: Tensor | None, out: Tensor, transposed: bool, accumulate: bool) -> None:
    """A LibraryProduct of these."""
    b = b.t() if transposed else b
    if accumulate:
        out.addmm_(a, b)
    elif bias is None:
        torch.mm(a, b, out=out)
    else:
        torch.addmm(bias, a, b, out=out)


@dataclass(frozen=True)
class LibraryProduct:
    """A product left to the vendor's library: out = a b^T or a b, + bias or, to `accumulate`, + out."""

    a: Tensor
    b: Tensor
    bias: Tensor | None
    out: Tensor
    transposed: bool
    accumulate: bool

    def run(self) -> None:
        multiply(self.a, self.b, self.bias, self.out, self.transposed, self.accumulate)


@dataclass(frozen=True)
class Zeros:
    """out = 0, where there is nothing to sum."""

    out: Tensor

    def run(self) -> None:
        self.out.zero_()


Step = KernelLaunch | LibraryProduct | Zeros
Plan = list[Step]
C = TypeVar("C", ForwardCall, BackwardCall)


@dataclass
class Problem(Generic[C]):
    """A call and what every launch of it needs to know.

    memory: the device of the workspace, that of x where none is named. A plan that is only to be prepared takes "meta".
    """

    call: C
    target: Target
    tf32: bool = False
    memory: str | None = None

    def __post_init__(self) -> None:
        call = self.call
        self.workspace: list[Tensor] = []
        self.zeroed: set[int] = set()
        self.x, self.weight, self.lora_a, self.lora_b = call.x, call.weight, call.lora_a, call.lora_b
        self.m, self.k = self.x.shape
        self.n, self.rank = self.lora_b.shape
        self.directions = 0 if call.dash_sigma is None else call.dash_sigma.shape[0]
        self.width = self.rank + self.directions
        self.r_block, self.rank_block = power_of_two(self.width), power_of_two(self.rank)
        self.itemsize = self.x.element_size()
        self.seed = call.seed if call.threshold > 0 else None
        # How many numbers the seed has; 0 without dropout.
        self.dropout = 0 if self.seed is None else self.seed.numel()
        self.scaling, self.threshold = call.scaling, call.threshold
        self.keep_scale = keep_scale(self.threshold if self.dropout else 0)
        # Kernels read no dash tensor where there is no direction.
        self.dash_u, self.dash_vt, self.dash_sigma = None, None, None
        if self.directions and call.dash_sigma is not None:
            self.dash_u, self.dash_vt, self.dash_sigma = call.dash_u, call.dash_vt, call.dash_sigma.contiguous()

    @property
    def precision(self) -> str:
        return "tf32" if self.tf32 and self.target.tf32 else "ieee"

    def stages(self, tile: TileConfig) -> int:
        """How many tiles of its operands a kernel without tensor descriptors keeps in flight."""
        by_matrix_instructions = self.itemsize == 2 or self.precision != "ieee"
        return tile.num_stages if self.target.copies_ahead or not by_matrix_instructions else 1

    @property
    def rank_constants(self) -> dict[str, int]:
        return {"RANK": self.rank, "DIRECTIONS": self.directions, "R_BLOCK": self.r_block}

    def adapter_args(self, names: str) -> dict[str, Any]:
        """Pointers and strides of the adapters named by their letters: a, b, u, v."""
        tensors = {
            "a": ("lora_a", self.lora_a, "ar ak"),
            "b": ("lora_b", self.lora_b, "bn br"),
            "u": ("dash_u", self.dash_u, "un us"),
            "v": ("dash_vt", self.dash_vt, "vs vk"),
        }
        args: dict[str, Any] = {}
        for letter in names:
            name, tensor, axes = tensors[letter]
            args |= {name: tensor, **strides(tensor, axes)}
        return args

    def empty(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Workspace, contiguous."""
        return self._kept(self.x.new_empty(shape, dtype=dtype or self.x.dtype, device=self.memory))

    def empty_columns(self, rows: int, columns: int) -> Tensor:
        """Workspace (rows, columns) in the dtype of x that lies column by column."""
        order = (1, rows)
        return self._kept(self.x.new_empty_strided((rows, columns), order, device=self.memory))

    def zeros(self, size: int, dtype: torch.dtype) -> Tensor:
        """Workspace that must be zero."""
        found = self._kept(self.x.new_zeros(size, dtype=dtype, device=self.memory))
        self.zeroed.add(id(found))
        return found

    def _kept(self, found: Tensor) -> Tensor:
        self.workspace.append(found)
        return found


def descriptor(t: Tensor, *block: int) -> Any:
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor(t, list(t.shape), list(t.stride()), list(block))


def is_descriptor(value: Any) -> bool:
    return hasattr(value, "block_shape")


def strides(t: Tensor | None, names: str) -> dict[str, int]:
    """A kernel's arguments "stride_xm", "stride_xk" for "xm xk"; 0 where there is no tensor."""
    found = (0, 0) if t is None else t.stride()
    return {f"stride_{name}": stride for name, stride in zip(names.split(), found, strict=True)}


def tile_count(size: int, block: int) -> int:
    return -(-size // block)


def round_up(size: int, block: int) -> int:
    return tile_count(size, block) * block


def power_of_two(size: int) -> int:
    """At least 16: the smallest side of a matrix instruction."""
    return max(16, 1 << max(size - 1, 0).bit_length())


def wide(*operands: Any) -> bool:
    """Do offsets inside a tile need 64 bits? No side of a tile is longer than 256."""
    return any(abs(s) * 512 >= 2**31 for t in operands if isinstance(t, Tensor) for s in t.stride())
