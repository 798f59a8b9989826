"""What the demonstration measured, for people and for programs."""

from __future__ import annotations

import collections
import json
import statistics
from dataclasses import dataclass, field

from timing import FROZEN
from torch import Tensor


@dataclass
class Run:
    """One training run: its loss by step, test scores, Δσ by step of the layers watched, routes of the pre-launch SVDs."""

    losses: list[float] = field(default_factory=list)
    spearman: float = float("nan")
    mae: float = float("nan")
    sigmas: dict[str, list[Tensor]] = field(default_factory=dict)
    routes: collections.Counter[str] = field(default_factory=collections.Counter)


@dataclass
class Report:
    """Everything that was measured; `markdown()` for people, `to_json()` for programs."""

    device: str
    backend: str
    parameters: dict[str, str]
    runs: dict[str, list[Run]]
    times: dict[str, float]
    gaps: dict[str, float]
    routes: dict[str, int]

    def scores(self) -> list[tuple[str, str, str]]:
        """(method, Spearman correlation, mean absolute error), mean ± deviation over seeds."""

        def spread(values: list[float]) -> str:
            return f"{statistics.fmean(values):.4f} ± {statistics.stdev(values) if len(values) > 1 else 0:.4f}"

        return [
            (name, spread([r.spearman for r in runs]), spread([r.mae for r in runs]))
            for name, runs in self.runs.items()
        ]

    def ratios(self) -> dict[str, float]:
        """The time of a training step over the frozen model's."""
        return {name: seconds / self.times[FROZEN] for name, seconds in self.times.items()}

    def markdown(self) -> str:
        lines = ["# LoRA-Dash on human sentiment ratings", "", f"Device: {self.device}", f"Backend: {self.backend}", ""]
        lines += [f"- {name}: {count}" for name, count in self.parameters.items()]
        lines += ["", "| method | Spearman (test) | mean absolute error |", "|---|---|---|"]
        lines += [f"| {name} | {rho} | {mae} |" for name, rho, mae in self.scores()]
        lines += ["", "| training step | over the frozen model |", "|---|---|"]
        lines += [f"| {name} | {ratio:.2f} |" for name, ratio in self.ratios().items()]
        lines += ["", "| largest difference of outputs | |", "|---|---|"]
        lines += [f"| {name} | {value:.1e} |" for name, value in self.gaps.items()]
        lines += ["", "Routes of the pre-launch SVDs: " + ", ".join(f"{k} {v}" for k, v in self.routes.items()), ""]
        return "\n".join(lines)

    def to_json(self) -> str:
        runs = {
            name: [{"losses": run.losses, "spearman": run.spearman, "mae": run.mae} for run in runs]
            for name, runs in self.runs.items()
        }
        about = {key: getattr(self, key) for key in ("device", "backend", "parameters", "times", "gaps", "routes")}
        return json.dumps({**about, "runs": runs}, indent=1)
