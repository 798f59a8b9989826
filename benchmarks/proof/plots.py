"""The picture of a proof: what the stages took, the verdicts beside their limits, what was measured of layers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

COLOURS = {"passed": "#2f855a", "failed": "#c53030", "missing": "#a0aec0", "over": "#dd6b20", "cut": "#d69e2e"}
VERDICT_COLOURS = {"passed": "#2f855a", "failed": "#c53030", "rehearsed": "#2b6cb0", "not measured": "#a0aec0"}
BASELINE, STEP = "frozen", "step ms"
MOST_SHAPES = 8


def draw(proof: dict[str, Any], path: Path) -> str | None:
    """Writes the picture; returns why it could not, or None."""
    try:
        import matplotlib
    except ImportError as error:
        return f"no picture: {error}"
    matplotlib.use("Agg")
    from matplotlib import pyplot

    measured = ratios([row["values"] for s in proof["stages"] if s["name"] == "bench" for row in s["rows"]])
    figure, axes = pyplot.subplots(1, 3, figsize=(19, 5.6), constrained_layout=True)
    stages(axes[0], proof["stages"])
    verdicts(axes[1], proof["verdicts"])
    layers(axes[2], measured)
    kind = "rehearsal on the CPU, no time means anything" if proof["rehearsal"] else proof["facts"]["card"]["name"]
    figure.suptitle(f"loradash-kernels: {kind}: {proof['result']}")
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return None


def stages(axis: Any, found: list[dict[str, Any]]) -> None:
    names = [stage["name"] for stage in found]
    axis.barh(names, [stage["budget"] for stage in found], color="#edf2f7")
    colours = [COLOURS[stage["ending"]] for stage in found]
    axis.barh(names, [stage["seconds"] for stage in found], color=colours, height=0.5)
    for place, stage in enumerate(found):
        axis.text(stage["budget"], place, f" {stage['ending']}, {stage['seconds']:.0f} s", va="center", fontsize=8)
    axis.invert_yaxis()
    axis.margins(x=0.25)
    axis.set(title="stages: seconds taken, of their budgets", xlabel="seconds")


def verdicts(axis: Any, found: list[dict[str, Any]]) -> None:
    """Each verdict's number, with its rule beside it; what was not measured has no bar."""
    values = [v["value"] or 0.0 for v in found]
    axis.barh(range(len(found)), values, color=[VERDICT_COLOURS[v["outcome"]] for v in found], height=0.4)
    for place, v in enumerate(found):
        number = "not measured" if v["value"] is None else f"{v['value']:.3f}"
        axis.text(0, place - 0.3, f"{v['name'][:60]}: {number} ({v['outcome']})", va="bottom", fontsize=7)
    axis.set_yticks([])
    axis.axvline(1, color="k", lw=0.6)
    axis.invert_yaxis()
    axis.set(title="verdicts: what was measured", xlabel="ratio")


def ratios(rows: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Forward + backward over the frozen layer's: group of rows (shape, dtype, dropout) -> arm -> ratio."""
    groups: dict[str, dict[str, float]] = {}
    for row in rows:
        if row.get("kind") == "layer" and row.get(STEP):
            name = f"{row['M']}x{row['K']}x{row['N']}\n{row['dtype']}, dropout {row['dropout']}"
            groups.setdefault(name, {})[row["arm"]] = row[STEP]
    kept = {name: arms for name, arms in groups.items() if arms.get(BASELINE)}
    return {name: {arm: t / arms[BASELINE] for arm, t in arms.items()} for name, arms in [*kept.items()][:MOST_SHAPES]}


def layers(axis: Any, groups: dict[str, dict[str, float]]) -> None:
    """Bars of each arm's ratio, shape by shape."""
    arms = list(dict.fromkeys(arm for group in groups.values() for arm in group if arm != BASELINE))
    width = 0.85 / max(1, len(arms))
    for i, arm in enumerate(arms):
        values = [group.get(arm, float("nan")) for group in groups.values()]
        axis.bar([place + i * width for place in range(len(groups))], values, width, label=arm)
    axis.axhline(1, color="k", lw=0.6)
    axis.set_xticks([place + 0.4 for place in range(len(groups))], list(groups), fontsize=6)
    axis.set(title="forward + backward over the frozen layer's", ylabel="ratio")
    if arms:
        axis.legend(frameon=False, fontsize=6, ncols=2)
    else:
        axis.text(0.5, 0.5, "no layer was measured beside the frozen one", ha="center", transform=axis.transAxes)
