"""Pictures of change rates and of how adapters agree. Needs matplotlib: `pip install loradash-kernels[plots]`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

BLUE, RED, GREY = "#2b6cb0", "#c53030", "#a0aec0"


def new_axes(columns: int = 1, width: float = 6.0) -> tuple[Any, Any]:
    """A figure and its axes, (columns,). Raises ImportError that names the extra where matplotlib is missing."""
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError("pictures need matplotlib: pip install loradash-kernels[plots]") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, columns, figsize=(width * columns, 3.6), constrained_layout=True, squeeze=False)
    for axis in axes[0]:
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes[0]


def save_figure(figure: Any, path: Path) -> Path:
    """Writes a figure, its folder too, and closes it."""
    from matplotlib import pyplot

    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=140)
    pyplot.close(figure)
    return path


def change_rates(rates: dict[str, tuple[Tensor, Tensor]], path: Path) -> Path:
    """Change rate by singular index (0: largest σ) for some layers; values are (rate (n,), chosen indices (s,))."""
    figure, axes = new_axes(len(rates), 5.0)
    for axis, (name, (rate, chosen)) in zip(axes, rates.items(), strict=True):
        axis.semilogy(range(len(rate)), rate.clamp_min(1e-12), color=GREY, lw=0.8)
        axis.semilogy(chosen, rate[chosen].clamp_min(1e-12), "o", color=RED, ms=4, label=f"chosen ({len(chosen)})")
        axis.set(title=name, xlabel="singular index, largest σ first", ylabel="change rate")
        axis.legend(frameon=False)
    return save_figure(figure, path)


def sorted_rates(rates: dict[str, Tensor], path: Path) -> Path:
    """Change rates of every layer, sorted, over the largest of the layer; one line a layer."""
    figure, (axis,) = new_axes(width=7)
    for rate in rates.values():
        ordered = rate.sort(descending=True).values
        axis.loglog(range(1, len(ordered) + 1), (ordered / ordered[0]).clamp_min(1e-9), color=BLUE, lw=0.6, alpha=0.5)
    axis.set(
        xlabel="rank of the direction", ylabel="change rate over the layer's largest", title=f"{len(rates)} layers"
    )
    return save_figure(figure, path)


def overlap_map(names: list[str], overlaps: Tensor, s: int, path: Path) -> Path:
    """Share of common directions of every two adapters, (adapters, adapters), as a heat map."""
    figure, (axis,) = new_axes(width=max(4.5, 0.7 * len(names) + 3))
    image = axis.imshow(overlaps.numpy(), vmin=0, vmax=1, cmap="viridis")
    for i in range(len(names)):
        for j in range(len(names)):
            axis.text(
                j, i, f"{overlaps[i, j]:.2f}", ha="center", va="center", color="w" if overlaps[i, j] < 0.7 else "k"
            )
    axis.set_xticks(range(len(names)), names, rotation=30, ha="right", fontsize=8)
    axis.set_yticks(range(len(names)), names, fontsize=8)
    axis.set_title(f"common directions among the top {s}, mean of the layers", fontsize=10)
    figure.colorbar(image, ax=axis, shrink=0.8)
    return save_figure(figure, path)


def agreement_lines(names: list[str], scores: list[tuple[float, float]], path: Path) -> Path:
    """Accuracy and recall of adapters, in the order given, against the last."""
    figure, (axis,) = new_axes(width=6)
    for i, (label, color) in enumerate(
        (("accuracy, top 8 in the last's top 16", BLUE), ("recall of the last's top 4", RED))
    ):
        axis.plot(range(len(names)), [score[i] for score in scores], "o-", color=color, label=label)
    axis.set_xticks(range(len(names)), names, rotation=30, ha="right", fontsize=8)
    axis.set_ylim(0, 1.05)
    axis.legend(frameon=False)
    return save_figure(figure, path)
