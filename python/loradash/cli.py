"""The `loradash` command."""

from __future__ import annotations

import contextlib
import re
from collections import Counter
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table
from tqdm.auto import tqdm

from loradash_kernels import __version__, available_backends, explain_backend

if TYPE_CHECKING:
    from .analysis import LayerRates

app = typer.Typer(help="LoRA-Dash fine-tuning with fused kernels.", no_args_is_help=True)
# Names, paths and messages have brackets and colons of their own: nothing that is printed is markup.
console = Console(markup=False, emoji=False)


class Method(str, Enum):
    auto = "auto"
    exact = "exact"


class Precision(str, Enum):
    bfloat16 = "bfloat16"
    float16 = "float16"
    float32 = "float32"
    float64 = "float64"


@contextlib.contextmanager
def reported() -> Iterator[None]:
    """A user's mistake, or a missing package, ends the command with its message and exit code 1."""
    try:
        yield
    except (ImportError, OSError, ValueError) as error:
        console.print(str(error), style="red", soft_wrap=True)
        raise typer.Exit(1) from error


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

    with reported():
        report = demo.finetune(out, steps, seeds, rate, blocks)
    console.print(f"\nBackend: {report.backend}")
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
    console.print(f"Written to {out}: {', '.join(sorted(p.name for p in out.iterdir()))}")


@app.command()
def decompose(
    model: Annotated[Path, typer.Argument(help="A .safetensors file of weights, or a folder of them.")],
    target: Annotated[str, typer.Option(help="Regular expression that a weight's name must contain.")] = r"\.weight$",
    exclude: Annotated[str, typer.Option(help="Regular expression of names to leave out.")] = "embed|lm_head",
    cache: Annotated[Path | None, typer.Option(help="Folder of the cache.")] = None,
    method: Annotated[Method, typer.Option(help="exact keeps all triplets of every weight.")] = Method.auto,
    dtype: Annotated[
        Precision | None,
        typer.Option(
            help="Of the model that launches, where it is loaded in less precision than the file's, or float64."
        ),
    ] = None,
) -> None:
    """Decompose a base model's weights once: every later launch from them costs milliseconds.

    A weight is found again by its values: those of the file, or, with --dtype, these rounded.
    """
    from .analysis import Weights
    from .cache import SpectralCache

    with reported():
        store = SpectralCache(cache)
        weights = Weights(model)
        wanted, unwanted = _pattern("target", target), _pattern("exclude", exclude)
        names = [n for n in weights.names() if wanted.search(n) and not unwanted.search(n)]
        if not names:
            raise ValueError(f"no matrix of {model} matches {target!r}: {', '.join(weights.names()[:6])}")
        routes: Counter[str] = Counter()
        for name in tqdm(names, desc="decompose", unit="weight"):
            weight = weights.load(name)
            try:
                kept = store.keep(weight.to(getattr(torch, dtype.value)) if dtype else weight, method.value)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error
            routes[kept.route] += 1
    console.print(f"{len(names)} weights: {', '.join(f'{route} {count}' for route, count in routes.items())}")
    console.print(f"{store.folder}: {store.size() / 2**20:.1f} MB")


def _pattern(option: str, text: str) -> re.Pattern[str]:
    try:
        return re.compile(text)
    except re.error as error:
        raise ValueError(f"--{option} {text!r} is no regular expression: {error}") from error


@app.command()
def directions(
    model: Annotated[Path, typer.Argument(help="The base model's .safetensors file, or a folder of them.")],
    adapters: Annotated[list[Path], typer.Argument(help="Adapters of save_adapter or PEFT; several are compared.")],
    out: Annotated[Path | None, typer.Option(help="Folder for pictures.")] = None,
    s: Annotated[int, typer.Option("--directions", "-s", min=1, help="How many of the highest rates to show.")] = 8,
) -> None:
    """Show the change rates of trained adapters, and how far their directions agree."""
    from . import analysis, plots

    with reported():
        weights = analysis.Weights(model)
        found = [analysis.layer_rates(weights, analysis.load_factors(path)) for path in adapters]
        names = [path.name if path.suffix != ".safetensors" else path.stem for path in adapters]
        overlaps = torch.tensor([[analysis.overlap(a, b, s) for b in found] for a in found])
        scores = analysis.agreement(found, found[-1])
        console.print(_rates_table(found[-1], s))
        if len(found) > 1:
            console.print(_pairs_table(names, overlaps, scores, s))
        if out is not None:
            shown = dict(list(found[-1].items())[:4])
            plots.change_rates({n: (r.rate, r.top(s)) for n, r in shown.items()}, out / "change_rates.png")
            plots.sorted_rates({n: r.rate for n, r in found[-1].items()}, out / "sorted_rates.png")
            if len(found) > 1:
                plots.overlap_map(names, overlaps, s, out / "overlap.png")
                plots.agreement_lines(names, scores, out / "agreement.png")
            console.print(f"Written to {out}: {', '.join(sorted(p.name for p in out.iterdir()))}")


def _rates_table(layers: dict[str, LayerRates], s: int) -> Table:
    table = Table("layer", f"top {s} by change rate (index of σ, 0 = largest)", "highest rate", "median rate")
    for layer, rates in layers.items():
        top = ", ".join(map(str, rates.top(s).tolist()))
        highest, median = f"{rates.rate.max():.3g}", f"{rates.rate.median():.3g}"
        table.add_row(layer, f"{top} of {rates.rate.numel()}", highest, median)
    return table


def _pairs_table(names: list[str], overlaps: torch.Tensor, scores: list[tuple[float, float]], s: int) -> Table:
    title = f"common directions among the top {s}; against the last"
    table = Table("adapter", *names, "accuracy", "recall", title=title)
    for name, row, (accuracy, recall) in zip(names, overlaps, scores, strict=True):
        table.add_row(name, *(f"{v:.2f}" for v in row), f"{accuracy:.2f}", f"{recall:.2f}")
    return table


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
