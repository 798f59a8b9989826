"""What a device is called: the words by which tables and measurements know it."""

from __future__ import annotations

import functools

import torch


@functools.cache
def architecture_of(device: torch.device) -> str:
    """ "sm_80", "gfx942", ..., or the type of a device that is no GPU."""
    if device.type != "cuda":
        return device.type
    if torch.version.hip:
        return torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
    major, minor = capability_of(device)
    return f"sm_{major}{minor}"


@functools.cache
def capability_of(device: torch.device) -> tuple[int, int]:
    """(9, 0) for sm_90: asked once, as PyTorch takes microseconds to answer."""
    return torch.cuda.get_device_capability(device)


@functools.cache
def name_of(device: torch.device) -> str:
    """ "NVIDIA A100-SXM4-40GB", ..., or the type of a device that is no GPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
