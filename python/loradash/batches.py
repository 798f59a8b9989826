"""How many layers are decomposed at a time: as many as a device's memory holds."""

from __future__ import annotations

import torch

BATCH_ELEMENTS = 2**26
"""Weights decomposed at a time on the CPU: 256 MB in float32."""

COPIES = 8
"""A decomposition on a GPU may need this many copies of a batch at once, in float32."""

# The libraries that PyTorch calls have memory of their own, and say so in their own words when there is none.
_WORDS = ("out of memory", "can't allocate memory", "ALLOC_FAILED")


def batch_elements(device: torch.device | str) -> int:
    """Weights to decompose at a time: what the GPU's free memory holds, or a fixed number on the CPU."""
    free = free_bytes(device)
    return BATCH_ELEMENTS if free is None else max(1, free // (4 * COPIES))


def free_bytes(device: torch.device | str) -> int | None:
    """What a GPU's allocator can still give: the card's free memory, and blocks that PyTorch keeps for reuse.

    None for other devices.
    """
    device = torch.device(device)
    if device.type != "cuda":
        return None
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def release(device: torch.device | str) -> None:
    """Gives blocks that PyTorch keeps for reuse back to the card, where the libraries' workspaces find them."""
    if torch.device(device).type == "cuda":
        torch.cuda.empty_cache()


def is_out_of_memory(error: BaseException) -> bool:
    """Did this fail for want of memory, and may a smaller batch succeed?"""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _WORDS)


def no_memory(name: str, n: int, k: int, device: torch.device) -> torch.OutOfMemoryError:
    """The error that names the layer whose weight (N, K) alone is too much for a device."""
    wanted, free = 4 * COPIES * n * k, free_bytes(device)
    rest = "" if free is None else f", of which {free:,} are free"
    return torch.OutOfMemoryError(
        f"{name}: its weight ({n}, {k}) alone cannot be decomposed on {device}, which takes up to {wanted:,} bytes{rest}; "
        'free some, or decompose elsewhere: prelaunch(model, device="cpu")'
    )
