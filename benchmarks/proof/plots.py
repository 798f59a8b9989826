"""The picture of a proof: what the stages took, the verdicts beside their limits, pre-launch beside the exact SVD."""

from __future__ import annotations

from pathlib import Path
from typing import Any

GREEN, RED, GREY, BLUE = "#2f855a", "#c53030", "#a0aec0", "#2b6cb0"
ENDINGS = {"passed": GREEN, "failed": RED, "missing": GREY, "over": "#dd6b20", "cut": "#d69e2e"}
VERDICTS = {"passed": GREEN, "failed": RED, "rehearsed": BLUE, "not measured": GREY}


def draw(proof: dict[str, Any], path: Path) -> None:
    """Writes the picture. Raises ImportError where matplotlib is missing."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 3, figsize=(18, 5), layout="constrained")
    stages(axes[0], proof["stages"])
    verdicts(axes[1], proof["verdicts"])
    prelaunch(axes[2], [row for stage in proof["stages"] if stage["name"] == "prelaunch" for row in stage["rows"]])
    kind = "rehearsal on the CPU, no time means anything" if proof["rehearsal"] else proof["facts"]["card"]["name"]
    figure.suptitle(f"loradash-kernels, {kind}: {proof['result']}")
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def stages(axis: Any, found: list[dict[str, Any]]) -> None:
    """Seconds of each stage over its budget, in the colour of its ending."""
    names = [stage["name"] for stage in found]
    axis.barh(names, [stage["budget"] for stage in found], color="#edf2f7")
    axis.barh(names, [stage["seconds"] for stage in found], color=[ENDINGS[s["ending"]] for s in found], height=0.5)
    for place, stage in enumerate(found):
        axis.text(stage["budget"], place, f" {stage['ending']}, {stage['seconds']:.0f} s", va="center", fontsize=8)
    axis.invert_yaxis()
    axis.margins(x=0.25)
    axis.set(title="stages: seconds taken, of their budgets", xlabel="seconds")


def verdicts(axis: Any, found: list[dict[str, Any]]) -> None:
    """Every number that a verdict rests on, over its limit: what lies right of 1 breaks it."""
    for place, verdict in enumerate(found):
        values = [number["value"] / number["limit"] for number in verdict["numbers"]]
        axis.plot(values, [place] * len(values), "o", ms=5, alpha=0.6, color=VERDICTS[verdict["outcome"]])
    axis.set_yticks(range(len(found)), [f"{v['name']}\n{v['outcome']}" for v in found], fontsize=8)
    axis.set_ylim(len(found) - 0.5, -0.5)
    axis.axvline(1, color="k", lw=0.8)
    if not any(verdict["numbers"] for verdict in found):
        axis.text(0.5, 0.5, "nothing was measured", ha="center", transform=axis.transAxes)
    axis.set(title="verdicts: every number over its limit", xlabel="measured / limit")


def prelaunch(axis: Any, rows: list[dict[str, Any]]) -> None:
    """Time over one exact SVD a layer, and the directions that are right."""
    measured = [row for row in rows if row["values"]]
    for i, (name, colour) in enumerate((("ratio", BLUE), ("accuracy", GREEN), ("recall", GREY))):
        values = [row["values"][name] for row in measured]
        axis.bar([place + 0.25 * i for place in range(len(measured))], values, 0.25, label=name, color=colour)
    axis.set_xticks([place + 0.25 for place in range(len(measured))], [row["name"] for row in measured], fontsize=8)
    axis.axhline(1, color="k", lw=0.6)
    if measured:
        axis.legend(["1", "time / exact SVD", "accuracy", "recall"], frameon=False, fontsize=8)
    else:
        axis.text(0.5, 0.5, "nothing was measured", ha="center", transform=axis.transAxes)
    axis.set(title="pre-launch")
