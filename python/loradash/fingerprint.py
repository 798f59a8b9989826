"""Fingerprints of weights: the names that their decompositions are kept under.

The bits of W, as float32 numbers in two halves of 16, are multiplied with eight columns of 16-bit keys: every row leaves
eight sums, every column too. The products are exact integers in float64, so neither device, layout nor library changes
them, and one pass over W where it lies serves both itself and its transpose. A cryptographic hash of the sums is the
fingerprint. Two weights that differ in a row agree in one of its sums with a chance of 2⁻¹⁶, in all eight of 2⁻¹²⁸.

No fingerprint is remembered: nothing cheaper than reading W sees every write to it (`weight.data`, NumPy, another view),
and a stale one would give another weight's directions.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

FORMAT = "loradash-spectrum-3"
KEYS = 8
# Sums of 2^21 products of two 16-bit numbers are exact in float64.
EXACT = 2**21
# So many elements are widened to float64 at a time: 2 MB on a CPU, 32 MB on a GPU.
CPU_ELEMENTS, GPU_ELEMENTS = 2**18, 2**22


class Fingerprint(NamedTuple):
    """The names of a weight (N, K) and of its transpose."""

    itself: str
    transposed: str


@torch.no_grad()
def fingerprint(weight: Tensor) -> Fingerprint:
    """Computes the fingerprints of a weight (N, K) and its transpose, in one pass where it lies.

    float16 and bfloat16 count as the float32 numbers that they are; float64 stays apart. Raises ValueError for other
    shapes, and for sides beyond EXACT.
    """
    if weight.dim() != 2:
        raise ValueError(f"weight has shape {tuple(weight.shape)}; wanted (N, K)")
    if max(weight.shape) > EXACT:
        raise ValueError(f"weight has shape {tuple(weight.shape)}; no side may be longer than {EXACT}")
    weight = weight.detach()
    # Apple's GPUs know no float64.
    weight = weight.cpu() if weight.device.type == "mps" else weight
    wide = "torch.float64" if weight.dtype == torch.float64 else "torch.float32"
    # Rows are read as they lie in memory.
    turned = weight.mT.is_contiguous() and not weight.is_contiguous()
    rows, columns = reversed(_sums(weight.mT)) if turned else _sums(weight)
    names = []
    for shape, sums in ((weight.shape, rows), (weight.shape[::-1], columns)):
        digest = hashlib.blake2b(json.dumps([FORMAT, list(shape), wide]).encode(), digest_size=20)
        digest.update(sums.to(torch.int64).cpu().contiguous().numpy().data)
        names.append(digest.hexdigest())
    return Fingerprint(*names)


def _sums(weight: Tensor) -> tuple[Tensor, Tensor]:
    """What the rows and the columns of a weight leave: (halves, KEYS, N) and (halves, KEYS, K), exact integers in float64."""
    (n, k), device = weight.shape, weight.device
    keys = _keys(max(n, k, 1)).to(device)
    halves = 4 if weight.dtype == torch.float64 else 2
    rows, columns = (torch.zeros(halves, KEYS, side, dtype=torch.float64, device=device) for side in (n, k))
    elements = CPU_ELEMENTS if device.type == "cpu" else GPU_ELEMENTS
    step = max(1, elements // max(1, k))
    bits = torch.empty(min(step, n), k, dtype=torch.float64, device=device)
    for first in range(0, n, step):
        part = weight[first : first + step]
        last, few = first + len(part), bits[: len(part)]
        for half, number in _halves(part):
            few.copy_(number)
            rows[half, :, first:last] = keys[:, :k] @ few.mT
            columns[half].addmm_(keys[:, first:last], few)
    return rows, columns


def _halves(part: Tensor) -> Iterator[tuple[int, Tensor]]:
    """The 16-bit halves of some rows' bits, as integers (rows, K), each with its place, but for those that are all zero."""
    if part.dtype == torch.bfloat16:
        yield 1, part.contiguous().view(torch.int16)
        return
    double = part.dtype == torch.float64
    bits = part.contiguous().view(torch.int64) if double else part.float().contiguous().view(torch.int32)
    last = 3 if double else 1
    for half in range(last):
        yield half, bits >> 16 * half & 0xFFFF
    yield last, bits >> 16 * last


@functools.lru_cache(maxsize=1)
def _table(length: int) -> Tensor:
    """Keys (KEYS, length), from a stream of bits that is the same everywhere."""
    stream = hashlib.shake_128(b"loradash").digest(2 * KEYS * length)
    return torch.frombuffer(bytearray(stream), dtype=torch.int16).view(length, KEYS).double().mT.contiguous()


def _keys(length: int) -> Tensor:
    """At least so many columns of keys; the table is made for the next power of two."""
    return _table(1 << (length - 1).bit_length())
