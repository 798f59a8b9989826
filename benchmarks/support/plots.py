"""Pictures of the benchmarks."""

from __future__ import annotations

from pathlib import Path

from loradash.plots import RED, new_axes, save_figure


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
