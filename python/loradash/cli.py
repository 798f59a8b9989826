"""The `loradash` command."""

from __future__ import annotations

import contextlib
import re
import runpy
from collections import Counter
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import torch
import typer
from rich.console import Console
from rich.table import Column, Table
from tqdm.auto import tqdm

from loradash_kernels import available_backends

from .devices import HELP, chosen_device, devices

if TYPE_CHECKING:
    from .analysis import LayerRates

app = typer.Typer(help="LoRA-Dash fine-tuning with fused kernels.", no_args_is_help=True)
# Names, paths and messages have brackets and colons of their own: nothing that is printed is markup.
console = Console(markup=False, emoji=False)

EXAMPLE = Path("examples", "sentiment")
Device = Annotated[str | None, typer.Option(help=HELP)]


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


# Every option goes to the example as it stands, --help too: there is one list of them.
@app.command(add_help_option=False, context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def finetune(context: typer.Context) -> None:
    """Fine-tune a pretrained sentence encoder on human ratings, with LoRA and with LoRA-Dash."""
    with reported():
        example = _example()
    program = runpy.run_path(str(example), run_name=example.name)["app"]
    program(context.args, prog_name=context.command_path)


def _example() -> Path:
    """The folder of the demonstration: in the checkout that this package runs from, or in a clone that is the current folder."""
    for root in (Path(__file__).parents[2], Path.cwd()):
        if (root / "python" / "loradash").is_dir() and (root / EXAMPLE / "__main__.py").is_file():
            return root / EXAMPLE
    raise FileNotFoundError(
        "the demonstration comes with the source, not with the installed package: run this in a clone of the repository, "
        f"where it is {EXAMPLE} (not found under {Path.cwd()})"
    )


@app.command()
def decompose(
    model: Annotated[Path, typer.Argument(help="A .safetensors file of weights, or a folder of them.")],
    target: Annotated[str, typer.Option(help="Regular expression that a weight's name must contain.")] = r"\.weight$",
    exclude: Annotated[str, typer.Option(help="Regular expression of names to leave out.")] = "embed|lm_head",
    cache: Annotated[Path | None, typer.Option(help="Folder of the cache; by default that of SpectralCache().")] = None,
    method: Annotated[
        Method, typer.Option(help="auto chooses a route by each weight's spectrum; exact keeps all triplets.")
    ] = Method.auto,
    dtype: Annotated[
        Precision | None,
        typer.Option(help="Dtype that the model is loaded in for training, where it is not the file's."),
    ] = None,
    device: Device = None,
) -> None:
    """Decompose a base model's weights once: every later launch from them costs milliseconds.

    A launch finds a weight's decomposition by the weight's values: the file's own, or these rounded to --dtype.
    """
    from .analysis import Weights
    from .cache import SpectralCache

    with reported():
        place = chosen_device(device)
        store = SpectralCache(cache)
        weights = Weights(model)
        wanted, unwanted = _pattern("target", target), _pattern("exclude", exclude)
        names = [n for n in weights.names() if wanted.search(n) and not unwanted.search(n)]
        if not names:
            raise ValueError(f"no matrix of {model} matches {target!r}: {', '.join(weights.names()[:6])}")
        routes: Counter[str] = Counter()
        for name in tqdm(names, desc="decompose", unit="weight"):
            weight = weights.load(name)
            # Rounded by the CPU, as where a model is loaded, and then decomposed on the device.
            weight = (weight.to(getattr(torch, dtype.value)) if dtype else weight).to(place)
            try:
                kept = store.keep(weight, method.value)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error
            routes[kept.route] += 1
    console.print(
        f"{len(names)} weights on {place}: {', '.join(f'{route} {count}' for route, count in routes.items())}"
    )
    console.print(f"{store.folder}: {store.size() / 2**20:.1f} MB")


def _pattern(option: str, text: str) -> re.Pattern[str]:
    try:
        return re.compile(text)
    except re.error as error:
        raise ValueError(f"--{option} {text!r} is no regular expression: {error}") from error


@app.command()
def directions(
    model: Annotated[Path, typer.Argument(help="The base model's .safetensors file, or a folder of them.")],
    adapters: Annotated[
        list[Path], typer.Argument(help="Written by save_adapter, or LoRA of PEFT; several are compared.")
    ],
    out: Annotated[Path | None, typer.Option(help="Folder for pictures; without it none are drawn.")] = None,
    s: Annotated[int, typer.Option("--directions", "-s", min=1, help="How many of the highest rates to show.")] = 8,
    device: Device = None,
) -> None:
    """Show the change rates of trained adapters, and how far their directions agree."""
    from . import analysis, plots

    with reported():
        place = chosen_device(device)
        weights = analysis.Weights(model)
        found = [analysis.layer_rates(weights, analysis.load_factors(path), device=place) for path in adapters]
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
def presets(name: Annotated[str | None, typer.Argument(help="Show this one alone, with its sources.")] = None) -> None:
    """Show the paper's settings that `DashConfig.preset(name)` gives."""
    from .presets import PRESETS, known

    if name is not None:
        with reported():
            console.print(str(known(name)), soft_wrap=True)
        return
    # A name that is cut cannot be typed.
    table = Table(Column("preset", no_wrap=True), "model", "r", "alpha", "learning rate", "targets")
    for title, preset in PRESETS.items():
        config, rate = preset.config, preset.training.get("learning_rate", "in no source")
        table.add_row(
            title, preset.model, *map(str, (config["r"], config["alpha"], rate)), ", ".join(config["target_modules"])
        )
    console.print(table)


@app.command()
def info(device: Annotated[str | None, typer.Option(help="This device alone; by default all.")] = None) -> None:
    """Show versions, cards, which backends can run here, which one each dtype takes on each device, and what to install."""
    from . import machine

    with reported():
        places = devices() if device is None else [chosen_device(device)]
    for name, value in machine.software().items():
        console.print(f"{name}: {value}", soft_wrap=True)
    table = Table("backend", "runs here")
    for name, reason in available_backends().items():
        table.add_row(name, reason or "yes")
    console.print(table)
    advice = [machine.unseen_cards()]
    for place in places:
        console.print(f"{place}: {machine.about(place)}", soft_wrap=True)
        found = machine.choices(place)
        # Only GPUs have several ways to compute the base product.
        ways = ["how"] * any(choice.how for choice in found.values())
        table = Table("dtype", "backend", *ways)
        for dtype, choice in found.items():
            table.add_row(str(dtype).removeprefix("torch."), choice.backend, *[choice.how] * len(ways))
        console.print(table)
        advice += machine.advice(place, found)
    for text in filter(None, advice):
        console.print(text, style="yellow", soft_wrap=True)


if __name__ == "__main__":
    app()
