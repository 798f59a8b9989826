"""Pictures of the benchmarks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from loradash.plots import GREY, RED, new_axes, save_figure

COLORS = ("#2b6cb0", "#63b3ed", "#a0aec0", "#4a5568", "#d6bc8a")
# A bar that is higher is cut.
HIGHEST = 3.0


def ratio_bars(rows: dict[str, dict[str, float]], title: str, path: Path) -> Path:
    """Time over a frozen nn.Linear: groups of bars; rows: group -> variant -> ratio."""
    figure, (axis,) = new_axes(width=max(7, 1.5 * len(rows)))
    variants = list(next(iter(rows.values())))
    width = 0.8 / max(1, len(variants))
    for i, variant in enumerate(variants):
        values = [row.get(variant, float("nan")) for row in rows.values()]
        color = RED if variant == "ours" else None
        axis.bar([g + i * width for g in range(len(rows))], values, width, label=variant, color=color)
    axis.axhline(1, color="k", lw=0.6)
    axis.set_xticks([g + 0.4 - width / 2 for g in range(len(rows))], list(rows), fontsize=7)
    axis.set(title=title, ylabel="time / frozen nn.Linear")
    axis.legend(frameon=False, fontsize=7)
    return save_figure(figure, path)


def ratio_panels(
    panels: dict[str, dict[str, dict[str, float]]],
    variants: Sequence[str],
    marked: str,
    title: str,
    path: Path,
    colors: Sequence[str] = COLORS,
) -> Path:
    """Time over a frozen nn.Linear, one panel below the other for each kind of time.

    panels: title -> group -> variant -> ratio. marked: the variant in red. colors: those of the others, in order. Bars higher than HIGHEST are cut; every bar carries
    its number.
    """
    widest = max(len(groups) for groups in panels.values())
    figure, (axis,) = new_axes(width=max(9.0, 1.6 * widest))
    axis.remove()
    # Title and legend take an inch.
    figure.set_figheight(1.0 + 2.9 * len(panels))
    axes = figure.subplots(len(panels), squeeze=False)[:, 0]
    for axis, (name, groups) in zip(axes, panels.items(), strict=True):
        _bars(axis, groups, variants, marked, colors)
        axis.set_title(name, fontsize=10, loc="left")
        axis.set_ylabel("time / frozen", fontsize=9)
        axis.set_xlim(-0.25, widest)
        axis.spines[["top", "right"]].set_visible(False)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=_legend_columns(labels), frameon=False, fontsize=8)
    figure.suptitle(title, fontsize=11)
    return save_figure(figure, path)


def _legend_columns(labels: Sequence[str], line: int = 130, key: int = 6) -> int:
    """One row where it fits. line, key: letters that go into the width of a figure, and into a label's patch of colour."""
    widths = [len(label) + key for label in labels]
    return len(labels) if sum(widths) <= line else max(1, line // max(widths))


def _bars(
    axis: Any, groups: dict[str, dict[str, float]], variants: Sequence[str], marked: str, colors: Sequence[str]
) -> None:
    width = 0.84 / len(variants)
    others = iter(colors)
    for place, variant in enumerate(variants):
        color = RED if variant == marked else next(others, GREY)
        known = [
            (index + place * width, group[variant]) for index, group in enumerate(groups.values()) if variant in group
        ]
        heights = [min(value, HIGHEST) for _, value in known]
        axis.bar([spot for spot, _ in known], heights, 0.92 * width, label=variant, color=color)
        for (spot, value), height in zip(known, heights, strict=True):
            axis.annotate(
                f"{value:.2f}" if value < 10 else f"{value:.0f}",
                (spot, height),
                xytext=(0, 2),
                textcoords="offset points",
                ha="center",
                va="bottom",
                fontsize=7,
                color=RED if variant == marked else "#2d3748",
                rotation=90,
            )
    axis.axhline(1, color="k", lw=0.7)
    axis.set_ylim(0, 1.2 * HIGHEST)
    axis.set_yticks([0, 1, 2, 3])
    axis.grid(axis="y", color="#e2e8f0", lw=0.6)
    axis.set_axisbelow(True)
    axis.set_xticks([index + 0.42 - width / 2 for index in range(len(groups))], list(groups), fontsize=8)
