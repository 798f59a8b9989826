"""What no layer can beat on this device: the vendor's products, a copy, an empty launch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from benchmarks.layers.meter import Meter, products_in

COPIED_BYTES = 1 << 30
SIDE = 8192


def roofs(meter: Meter, side: int = SIDE, copied: int = COPIED_BYTES) -> list[dict[str, Any]]:
    """Rows "arm", "step ms" and what follows from it: TFLOP/s of bf16, fp16, fp32 and TF32 products of `side` cubed, GB/s of a copy."""
    found = [_launch(meter), _copy(meter, copied)]
    for name, dtype, tf32 in (
        ("bf16", torch.bfloat16, False),
        ("fp16", torch.float16, False),
        ("fp32", torch.float32, False),
        ("tf32", torch.float32, True),
    ):
        found.append(_product(meter, name, dtype, tf32, side))
    return found


def _row(meter: Meter, arm: str, call: Any) -> dict[str, Any]:
    found = meter.measure({arm: call})
    if arm in found.errors:
        return {"arm": arm, "error": found.errors[arm]}
    samples = found.samples[arm]
    return {"arm": arm, "step ms": samples.median, "spread": samples.spread, "rounds": len(samples.milliseconds)}


def _launch(meter: Meter) -> dict[str, Any]:
    """The smallest kernel: what a launch takes on the device, and the resolution of its events."""
    one = torch.zeros(1, device=meter.device)
    return _row(meter, "empty launch", one.zero_)


def _copy(meter: Meter, size: int) -> dict[str, Any]:
    source = torch.zeros(size, dtype=torch.uint8, device=meter.device)
    target = torch.empty_like(source)
    row = _row(meter, f"copy of {size >> 20} MiB", lambda: target.copy_(source))
    if "step ms" in row:
        row["GB/s"] = 2e-6 * size / row["step ms"]
    return row


def products(side: int, device: torch.device) -> Callable[[], object]:
    """What loads a card: a bf16 product."""
    a = torch.randn(side, side, dtype=torch.bfloat16, device=device)
    return lambda: a @ a


def _product(meter: Meter, name: str, dtype: torch.dtype, tf32: bool, side: int) -> dict[str, Any]:
    a, b = (torch.randn(side, side, dtype=dtype, device=meter.device) for _ in range(2))
    out = torch.empty_like(a)
    with products_in(tf32):
        row = _row(meter, f"{name} product {side} cubed", lambda: torch.mm(a, b, out=out))
    if "step ms" in row:
        row["TFLOP/s"] = 2e-9 * side**3 / row["step ms"]
    return row
