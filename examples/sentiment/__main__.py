"""`python examples/sentiment`: runs the demonstration and prints what it measured."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import demonstration
import typer
from loradash.cli import console, reported
from loradash.devices import HELP, chosen_device
from report import Report
from rich.table import Table

app = typer.Typer(add_completion=False)


@app.command()
def main(
    out: Annotated[Path, typer.Option(help="Folder for the report, pictures and adapters.")] = Path("runs/demo"),
    steps: Annotated[int, typer.Option(min=4, help="Optimizer steps of a run.")] = 300,
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each method.")] = 3,
    rate: Annotated[float, typer.Option(help="Peak learning rate.")] = 1e-3,
    blocks: Annotated[int, typer.Option(min=1, help="Rounds of the time measurement.")] = 8,
    device: Annotated[str | None, typer.Option(help=HELP)] = None,
) -> None:
    """Fine-tune a pretrained sentence encoder on human sentiment ratings, with LoRA and with LoRA-Dash."""
    with reported():
        report = demonstration.finetune(out, steps, seeds, rate, blocks, chosen_device(device))
    console.print(f"\nDevice: {report.device}")
    console.print(f"Backend: {report.backend}")
    for name, count in report.parameters.items():
        console.print(f"{name}: {count}")
    for table in _tables(report, title=f"{seeds} seeds, {steps} steps: mean ± deviation"):
        console.print(table)
    console.print(f"Written to {out}: {', '.join(sorted(p.name for p in out.iterdir()))}")


def _tables(report: Report, title: str) -> tuple[Table, ...]:
    scores = Table("method", "Spearman (test)", "mean absolute error", title=title)
    for row in report.scores():
        scores.add_row(*row)
    times = Table("training step", "ms", "over frozen", title="Median time of a step of 32 words")
    for name, ratio in report.ratios().items():
        times.add_row(name, f"{1e3 * report.times[name]:.0f}", f"{ratio:.2f}")
    gaps = Table("model", "largest difference of outputs", title="What was saved")
    for name, gap in report.gaps.items():
        gaps.add_row(name, f"{gap:.1e}")
    return scores, times, gaps


if __name__ == "__main__":
    app(prog_name="python examples/sentiment")
