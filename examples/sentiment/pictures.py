"""Pictures of the demonstration's runs."""

from __future__ import annotations

import statistics
from pathlib import Path

from loradash.plots import BLUE, GREY, RED, new_axes, save_figure
from torch import Tensor


def loss_curves(losses: dict[str, list[list[float]]], launch: int, path: Path, window: int = 20) -> Path:
    """Training loss by step, one line a seed, running means; a dotted line where the directions launch."""
    figure, (axis,) = new_axes(width=7)
    for (name, runs), color in zip(losses.items(), (BLUE, RED, GREY), strict=False):
        for i, run in enumerate(runs):
            smooth = [statistics.fmean(run[max(0, step - window) : step + 1]) for step in range(len(run))]
            axis.plot(smooth, color=color, lw=1, alpha=0.8, label=name if i == 0 else None)
    axis.axvline(launch, color="k", ls=":", lw=0.8)
    axis.set(xlabel="optimizer step", ylabel=f"training loss (mean of {window})", yscale="log")
    axis.legend(frameon=False)
    return save_figure(figure, path)


def sigma_paths(paths: dict[str, Tensor], path: Path) -> Path:
    """Δσ of some layers by step; values are (steps, s)."""
    figure, axes = new_axes(len(paths), 5.0)
    for axis, (name, values) in zip(axes, paths.items(), strict=True):
        axis.plot(values.numpy(), lw=0.9)
        axis.set(title=name, xlabel="optimizer step", ylabel="Δσ")
        axis.axhline(0, color="k", lw=0.5)
    return save_figure(figure, path)
