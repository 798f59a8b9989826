"""A mixed batch beside one call for each adapter, one adapter for all, and the frozen layer: python -m benchmarks.layers.adapters

Eight sequences over four adapters, eight layers, one thread. A separate call gets its rows gathered
already and its adapter made active beforehand, so it pays for neither. Ratios are those of one run, variants in turn, medians.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import loradash
import torch
from torch import Tensor, nn

from benchmarks.support.measure import interleaved, write_csv

SEQUENCES, LAYERS = 8, 8
NAMES = ("a", "b", "c", "d")
ORDERS = {"sorted": [n for n in NAMES for _ in range(2)], "turns": [*NAMES, *NAMES]}


def plain(width: int) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(width, width) for _ in range(LAYERS)))


def model_of(width: int) -> nn.Module:
    """Layers width x width with four adapters of rank 8 and 8 directions, each with something in every term."""
    config = loradash.DashConfig(r=8, directions=8)
    model = loradash.apply_dash(plain(width), config, adapter=NAMES[0])
    for name in NAMES[1:]:
        loradash.add_adapter(model, name, config)
    for module in model.modules():
        for key in ("lora_b", "dash_sigma", "dash_u", "dash_vt"):
            tensor = module._parameters.get(key, module._buffers.get(key))
            if tensor is not None:
                nn.init.normal_(tensor, std=0.02)
    return model


def separate(model: nn.Module, name: str) -> nn.Module:
    """The same layer with one adapter, active."""
    loradash.set_adapter(model, name)
    return model


def variants(tokens: int, width: int, order: str, backward: bool) -> dict[str, Callable[[], Any]]:
    """A step of each variant on 8 sequences of so many tokens."""
    x, names = torch.randn(SEQUENCES, tokens, width), ORDERS[order]
    model = model_of(width)
    apart = {name: separate(model_of(width), name) for name in NAMES}
    rows = {name: x[[i for i, n in enumerate(names) if n == name]].clone() for name in NAMES}
    if backward:
        loradash.train_adapters(model, NAMES[1:])
    dy = torch.randn(SEQUENCES, tokens, width)
    # No time is taken of what is not right.
    with torch.no_grad(), loradash.mixed_batch(model, names):
        y = model(x)
    for name in NAMES:
        torch.testing.assert_close(y[[n == name for n in names]], apart[name](rows[name]), rtol=1e-4, atol=1e-4)

    def step(one: nn.Module, given: Tensor) -> None:
        if not backward:
            with torch.no_grad():
                one(given)
            return
        given = given.requires_grad_()
        one(given).backward(dy[: given.shape[0]])

    def mixed() -> None:
        with loradash.mixed_batch(model, names):
            step(model, x)

    def one_by_one() -> None:
        for name in NAMES:
            step(apart[name], rows[name])

    frozen = plain(width).requires_grad_(False)
    return {
        "mixed": mixed,
        "separate": one_by_one,
        "one adapter": lambda: step(apart["a"], x),
        "frozen": lambda: step(frozen, x),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path, help="a folder; gets adapters.csv")
    options = parser.parse_args()
    torch.set_num_threads(1)
    lines = []
    for width in (512, 1024):
        for tokens, order, backward in (
            (1, "sorted", False),
            (1, "turns", False),
            (64, "sorted", False),
            (64, "turns", False),
            (64, "turns", True),
        ):
            times = interleaved(variants(tokens, width, order, backward), options.rounds, 20 if tokens == 1 else 3)
            line = {
                "width": width,
                "tokens a sequence": tokens,
                "order": order,
                "pass": "forward + backward" if backward else "forward",
                **{f"mixed / {name}": round(times["mixed"] / times[name], 3) for name in times if name != "mixed"},
            }
            print(line, flush=True)
            lines.append(line)
    if options.out is not None:
        write_csv(options.out / "adapters.csv", lines)


if __name__ == "__main__":
    main()
