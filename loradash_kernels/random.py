"""Dropout: its probability in 16 bits, the seed, and the mask that every backend draws for it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

PHILOX_STEPS = 65536
"""Dropout probabilities are multiples of 1 / 65536: 16 random bits an element."""

_M0, _M1 = 0xD2511F53, 0xCD9E8D57
_W0, _W1 = 0x9E3779B9, 0xBB67AE85
_WORD = 0xFFFFFFFF
_BLOCK = 8


def dropout_threshold(p: float) -> int:
    """The 16-bit threshold below which an element is dropped. `p` is a probability in [0, 1); ValueError otherwise."""
    if not 0.0 <= p < 1.0:
        raise ValueError(f"dropout_p must be in [0, 1), got {p}")
    return min(round(p * PHILOX_STEPS), PHILOX_STEPS - 1)


def keep_scale(threshold: int) -> float:
    """1 / (1 - p) for the p that the threshold stands for."""
    return PHILOX_STEPS / (PHILOX_STEPS - threshold)


def draw_seed(device: torch.device | str = "cpu") -> Tensor:
    """(2,) int64: the key of Philox and the offset of its counter, 63 random bits each, from torch's generator."""
    if torch.compiler.is_compiling():
        # The compiler knows no in-place draws.
        return torch.randint(0, 2**63 - 1, (2,), dtype=torch.int64, device=device)
    return torch.empty(2, dtype=torch.int64, device=device).random_()


def window(seed: Tensor, row: int, column: int) -> Tensor:
    """The seed of a part of a matrix: a call with it draws the mask that the whole has from this row and column on.

    seed: that of the whole, (2,) int64, or (4,) where the whole is itself a part: places add up. The result, (4,) int64, is
    key, offset, first row, first column.

    Raises:
        ValueError: a column that is not a multiple of 8 (one draw serves eight neighbours), a place outside [0, 2**32), to
            which the counters of rows and columns reach; a seed that is none.
    """
    check_seed(seed)
    for name, place, step in (("row", row, 1), ("column", column, _BLOCK)):
        if not 0 <= place <= _WORD or place % step:
            raise ValueError(f"{name} is {place}; wanted a multiple of {step} in [0, 2**32)")
    # A copy from the host would be refused while a CUDA graph is captured; filling is not.
    origin = torch.cat((seed.new_full((1,), row), seed.new_full((1,), column)))
    found = torch.cat((seed[:2], origin if seed.numel() == 2 else origin + seed[2:]))
    check_place(found)
    return found


def row_windows(seed: Tensor, rows: Sequence[int]) -> tuple[Tensor, ...]:
    """`window(seed, row, 0)` for each of ascending rows, in few operations however many there are."""
    if not rows:
        return ()
    found = window(seed, 0, 0).repeat(len(rows), 1)
    found[:, 2] += torch.tensor(rows, device=seed.device)
    check_place(found[-1])
    return found.unbind(0)


def check_seed(seed: Tensor, x: Tensor | None = None) -> None:
    """Raises ValueError for what is no seed, (2,) or (4,) int64 without gaps, or not one for x: on another device."""
    if seed.dtype != torch.int64 or seed.dim() != 1 or seed.numel() not in (2, 4) or not seed.is_contiguous():
        raise ValueError(
            f"seed has shape {tuple(seed.shape)}, dtype {seed.dtype} and strides {seed.stride()}; wanted (2,) int64 of "
            "`draw_seed`, or (4,) of `window`, contiguous"
        )
    if x is not None and seed.device != x.device:
        raise ValueError(f"seed is on {seed.device}, x is on {x.device}; they must be on one device")


def check_place(seed: Tensor, rows: int = 1) -> None:
    """Raises ValueError where so many rows are known not to fit a window: where the seed is a plain tensor on the CPU."""
    if seed.numel() == 2 or not seed.is_cpu or type(seed) is not Tensor or torch.compiler.is_compiling():
        return
    _, _, row, column = seed.tolist()
    if not 0 <= row <= _WORD + 1 - rows:
        raise ValueError(f"seed begins at row {row} of the whole; with {rows} rows wanted one in [0, 2**32 - {rows}]")
    if not 0 <= column <= _WORD or column % _BLOCK:
        raise ValueError(f"seed begins at column {column} of the whole; wanted a multiple of {_BLOCK} in [0, 2**32)")


def _product(constant: int, word: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of constant * word; int64 tensors hold 32-bit words, so the factors are split in half."""
    low = constant * (word & 0xFFFF)
    high = constant * (word >> 16)
    total = (high & 0xFFFF_FFFF_FFFF) + (low >> 16)
    return (total >> 16) & _WORD, ((total & 0xFFFF) << 16) | (low & 0xFFFF)


def philox_words(
    seed: Tensor,  # (2,) int64: key, then counter offset; what follows is not read
    m: Tensor,  # broadcastable int64
    block: Tensor,  # broadcastable int64, k // 8
) -> list[Tensor]:
    """The four 32-bit words of Philox4x32-10 (Salmon et al., SC 2011), counter (block, m, offset), as int64."""
    key0, key1 = seed[0] & _WORD, (seed[0] >> 32) & _WORD
    shape = torch.broadcast_shapes(m.shape, block.shape)
    c = [block.expand(shape), m.expand(shape), (seed[1] & _WORD).expand(shape), ((seed[1] >> 32) & _WORD).expand(shape)]
    for _ in range(10):
        high0, low0 = _product(_M0, c[0])
        high1, low1 = _product(_M1, c[2])
        c = [high1 ^ c[1] ^ key0, low1, high0 ^ c[3] ^ key1, low0]
        key0, key1 = (key0 + _W0) & _WORD, (key1 + _W1) & _WORD
    return c


def dropout_mask(seed: Tensor, threshold: int, m: int, k: int) -> Tensor:
    """Keep mask (m, k), bool: the bits every backend draws for this seed and 16-bit threshold.

    seed: (2,) int64, or (4,), where the mask is that of a `window`.
    """
    return dropout_rows(seed, threshold, torch.arange(m, device=seed.device), k)


def dropout_rows(seed: Tensor, threshold: int, rows: Tensor, k: int) -> Tensor:
    """Some rows of `dropout_mask`: (len(rows), k), bool."""
    if threshold == 0:
        return torch.ones(len(rows), k, dtype=torch.bool, device=seed.device)
    blocks = torch.arange((k + _BLOCK - 1) // _BLOCK, device=seed.device)
    if seed.numel() == 4:
        rows, blocks = (rows + seed[2]) & _WORD, blocks + seed[3] // _BLOCK
    words = torch.stack(philox_words(seed, rows[:, None], blocks[None, :]), dim=-1)  # (m, blocks, 4)
    halves = torch.stack((words & 0xFFFF, words >> 16), dim=-1)  # (m, blocks, 4, 2)
    return (halves.flatten(1)[:, :k] >= threshold).contiguous()
