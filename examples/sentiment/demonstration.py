"""Trains LoRA and LoRA-Dash on the same batches, compares them, and checks everything that was saved."""

from __future__ import annotations

import collections
import copy
import statistics
from pathlib import Path

import loradash
import pictures
import torch
from data import BATCH, Ratings, load_model, load_ratings
from loradash import DashConfig, DashSchedule, dash_layers, plots
from report import Report, Run
from timing import name_of, step_times
from torch import Tensor, nn
from tqdm.auto import tqdm

from loradash_kernels import change_rates, explain_backend


def finetune(
    folder: Path,
    steps: int = 300,
    seeds: int = 3,
    rate: float = 1e-3,
    blocks: int = 8,
    device: torch.device | None = None,
) -> Report:
    """Runs the demonstration on a device, by default the CPU; writes report.md, results.json, pictures, adapters to `folder`.

    LoRA and LoRA-Dash have the same rank and learn for the same number of steps on the same batches; LoRA-Dash trains its
    s coordinates a layer on top (0.1% more parameters). Scores are what they are, whichever wins.
    """
    device = device or torch.device("cpu")
    pristine, tokenizer = load_model()
    pristine.to(device)
    data = load_ratings(tokenizer).to(device)
    dash = DashConfig(
        r=8,
        alpha=16,
        directions=8,
        prelaunch_steps=min(100, steps // 3),
        dropout=0.05,
        target_modules=r"encoder\.encoder\..*",
        trainable_modules=["head"],
    )
    lora = DashConfig(**{**dash.to_dict(), "directions": 0})
    runs: dict[str, list[Run]] = {"LoRA": [], "LoRA-Dash": []}
    parameters: dict[str, str] = {}
    for seed in range(seeds):
        for name, config in (("LoRA", lora), ("LoRA-Dash", dash)):
            torch.manual_seed(seed)
            model = copy.deepcopy(pristine)
            nn.init.zeros_(model.head.weight)
            loradash.apply_dash(model, config)
            parameters[name] = str(loradash.summary(model))
            watched = _some_layers(model) if config.directions else []
            runs[name].append(train(model, data, steps, seed, rate, f"{name}, seed {seed}", watched))
    folder.mkdir(parents=True, exist_ok=True)
    last = runs["LoRA-Dash"][-1]
    gaps = check_artifacts(model, pristine, data, folder)
    losses = {name: [run.losses for run in of_method] for name, of_method in runs.items()}
    pictures.loss_curves(losses, dash.prelaunch_steps, folder / "loss.png")
    pictures.sigma_paths({name: torch.stack(path) for name, path in last.sigmas.items()}, folder / "sigma.png")
    plots.change_rates(_rates(model, watched), folder / "change_rates.png")
    times = step_times(pristine, data, dash, blocks)
    backend = str(explain_backend(torch.empty(1, 1, device=device))).splitlines()[0]
    report = Report(name_of(device), backend, parameters, runs, times, gaps, dict(last.routes))
    (folder / "report.md").write_text(report.markdown())
    (folder / "results.json").write_text(report.to_json())
    return report


def _some_layers(model: nn.Module) -> list[str]:
    """Three layers, from all depths."""
    names = list(dash_layers(model))
    return names[:: max(1, len(names) // 3)][:3]


def train(model: nn.Module, data: Ratings, steps: int, seed: int, rate: float, label: str, watched: list[str]) -> Run:
    """Trains in place for `steps` optimizer steps of 32 words; keeps Δσ of the layers watched."""
    run = Run(sigmas={name: [] for name in watched})
    generator = torch.Generator().manual_seed(seed)
    rows = data.training_rows()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate, weight_decay=0.0)
    schedule = DashSchedule(model, progress=False)
    decay = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 20) * (1 - step / steps))
    model.train()
    layers = dash_layers(model)
    with tqdm(total=steps, desc=label, unit="step") as bar:
        for _ in range(steps):
            batch = rows[torch.randint(len(rows), (BATCH,), generator=generator)]
            loss = nn.functional.mse_loss(model(*data.inputs(batch)), data.ratings(batch))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            decay.step()
            schedule.step()
            run.losses.append(loss.item())
            for name in watched:
                run.sigmas[name].append(layers[name].dash_sigma.detach().cpu().clone())
            bar.set_postfix(loss=f"{statistics.fmean(run.losses[-20:]):.3f}")
            bar.update()
    run.routes = collections.Counter(report.route for report in schedule.reports)
    run.spearman, run.mae = evaluate(model, data)
    return run


@torch.no_grad()
def evaluate(model: nn.Module, data: Ratings) -> tuple[float, float]:
    """Spearman correlation and mean absolute error on the test words."""
    model.eval()
    rows = data.test_rows()
    predicted = torch.cat([model(*data.inputs(part)) for part in rows.split(256)])
    rating = data.ratings(rows)
    spearman = torch.corrcoef(torch.stack((_ranks(predicted), _ranks(rating))))[0, 1]
    return float(spearman), float((predicted - rating).abs().mean())


def _ranks(x: Tensor) -> Tensor:
    """Ranks of x (n,), equal values sharing their mean rank."""
    _, inverse, counts = torch.unique(x, return_inverse=True, return_counts=True)
    return (counts.cumsum(0).double() - (counts - 1) / 2)[inverse]


@torch.no_grad()
def check_artifacts(model: nn.Module, pristine: nn.Module, data: Ratings, folder: Path) -> dict[str, float]:
    """Saves, reloads, merges and exports; the largest difference of each from the trained model's outputs."""
    from peft import PeftModel

    model.eval()
    batch = data.inputs(data.test_rows()[:64])
    expected = model(*batch)

    def gap(other: nn.Module) -> float:
        return float((other.eval()(*batch) - expected).abs().max())

    device = str(expected.device)

    saved = loradash.save_adapter(model, folder / "adapter")
    gaps = {"reloaded": gap(loradash.load_adapter(copy.deepcopy(pristine), saved))}
    loradash.merge(model)
    gaps["merged"] = gap(model)
    loradash.unmerge(model)
    gaps["unmerged"] = gap(model)
    loradash.export_lora(model, folder / "lora")
    gaps["exported, in PEFT"] = gap(
        PeftModel.from_pretrained(copy.deepcopy(pristine), str(folder / "lora"), torch_device=device)
    )
    with loradash.disable(model):
        untouched = copy.deepcopy(pristine).eval()
        untouched.head.load_state_dict(model.head.state_dict())
        gaps["disabled, against the base model"] = float((model(*batch) - untouched(*batch)).abs().max())
    return gaps


@torch.no_grad()
def _rates(model: nn.Module, names: list[str]) -> dict[str, tuple[Tensor, Tensor]]:
    """Change rates over the whole spectrum of some layers, by the trained A and B, and where the launched v_i lie."""
    found = {}
    for name in names:
        layer = dash_layers(model)[name]
        rates = change_rates(layer.weight_nk(), layer.lora_a, layer.lora_b, scaling=layer.scaling, method="exact")
        chosen = (layer.dash_vt @ rates.vt.mT).abs().argmax(-1)
        found[name.removeprefix("encoder.encoder.")] = (rates.rate.cpu(), chosen.cpu())
    return found
