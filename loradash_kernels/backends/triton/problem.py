"""The vocabulary of a plan: the problem that a call poses, and what solves it, as data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from ...calls import BackwardCall, ForwardCall
from ...random import keep_scale
from .target import Target


@dataclass(frozen=True)
class KernelLaunch:
    """A kernel, its grid, and its arguments by name: those of run time and those that are compiled in."""

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


Plan = list[KernelLaunch | LibraryProduct]
C = TypeVar("C", ForwardCall, BackwardCall)


@dataclass
class Problem(Generic[C]):
    """A call and what every launch of it needs to know."""

    call: C
    target: Target
    tf32: bool = False

    def __post_init__(self) -> None:
        call = self.call
        self.x, self.weight, self.lora_a, self.lora_b = call.x, call.weight, call.lora_a, call.lora_b
        self.m, self.k = self.x.shape
        self.n, self.rank = self.lora_b.shape
        self.directions = 0 if call.dash_sigma is None else call.dash_sigma.shape[0]
        self.width = self.rank + self.directions
        self.r_block, self.rank_block = power_of_two(self.width), power_of_two(self.rank)
        self.itemsize = self.x.element_size()
        self.dropout = call.threshold > 0 and call.seed is not None
        self.seed = call.seed if self.dropout else None
        self.scaling, self.threshold = call.scaling, call.threshold
        self.keep_scale = keep_scale(self.threshold if self.dropout else 0)
        # Kernels read no dash tensor where there is no direction.
        self.dash_u, self.dash_vt, self.dash_sigma = None, None, None
        if self.directions and call.dash_sigma is not None:
            self.dash_u, self.dash_vt, self.dash_sigma = call.dash_u, call.dash_vt, call.dash_sigma.contiguous()

    @property
    def precision(self) -> str:
        return "tf32" if self.tf32 and self.target.tf32 else "ieee"

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
        """Workspace on the device of x."""
        return self.x.new_empty(shape, dtype=dtype or self.x.dtype)


def descriptor(t: Tensor, *block: int) -> Any:
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor(t, list(t.shape), list(t.stride()), list(block))


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
