"""The `loradash` command."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

from loradash_kernels import __version__, available_backends, explain_backend

app = typer.Typer(help="LoRA-Dash fine-tuning with fused kernels.", no_args_is_help=True)
console = Console()


@app.command()
def finetune(
    out: Annotated[Path, typer.Option(help="Folder for the report, pictures and adapters.")] = Path("runs/demo"),
    steps: Annotated[int, typer.Option(min=4, help="Optimizer steps of a run.")] = 300,
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each method.")] = 3,
    rate: Annotated[float, typer.Option(help="Peak learning rate.")] = 1e-3,
    blocks: Annotated[int, typer.Option(min=1, help="Rounds of the time measurement.")] = 8,
) -> None:
    """Fine-tune a pretrained sentence encoder on human sentiment ratings, with LoRA and with LoRA-Dash."""
    from . import finetune as demo

    try:
        report = demo.finetune(out, steps, seeds, rate, blocks)
    except ImportError as error:
        console.print(f"[red]{error}")
        raise typer.Exit(1) from error
    console.print(f"\nBackend: [bold]{report.backend}")
    for name, count in report.parameters.items():
        console.print(f"{name}: {count}")
    scores = Table(
        "method", "Spearman (test)", "mean absolute error", title=f"{seeds} seeds, {steps} steps: mean ± deviation"
    )
    for row in report.scores():
        scores.add_row(*row)
    times = Table("training step", "ms", "over frozen", title="Median time of a step of 32 words")
    base = report.times["frozen model, head only"]
    for name, seconds in report.times.items():
        times.add_row(name, f"{1e3 * seconds:.0f}", f"{seconds / base:.2f}")
    gaps = Table("model", "largest difference of outputs", title="What was saved")
    for name, gap in report.gaps.items():
        gaps.add_row(name, f"{gap:.1e}")
    for table in (scores, times, gaps):
        console.print(table)
    console.print(f"Written to [bold]{out}[/]: {', '.join(sorted(p.name for p in out.iterdir()))}")


@app.command()
def info() -> None:
    """Show the version, which backends can run here, and which one each dtype takes."""
    console.print(f"loradash-kernels {__version__}, PyTorch {torch.__version__}")
    table = Table("backend", "runs here")
    for name, reason in available_backends().items():
        table.add_row(name, reason or "yes")
    console.print(table)
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        console.print(f"{dtype}: {explain_backend(torch.empty(1, 1, dtype=dtype)).backend}")


if __name__ == "__main__":
    app()
