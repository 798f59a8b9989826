"""How early in training do the directions settle, and what do they depend on?

    python -m benchmarks.studies.settling

Needs the extra `demo`, and takes minutes: five runs of 100 steps.

Trains LoRA on human sentiment ratings (the demonstration's data) for 100 steps with several settings, measures the change
rates of all encoder layers after 10, 25, 50, 75 and 100 steps, and compares them as the paper does.
"""

from __future__ import annotations

import copy
import statistics

import torch
from loradash import DashConfig, apply_dash, dash_layers
from loradash.analysis import LayerRates, agreement, overlap
from rich.console import Console
from rich.table import Table
from torch import nn
from tqdm import tqdm

from examples.sentiment.data import BATCH, load_model, load_ratings
from loradash_kernels import change_rates

STEPS = (10, 25, 50, 75, 100)
BASE = {"r": 8, "dropout": 0.05, "seed": 0}
VARIANTS = {"base": {}, "seed 1": {"seed": 1}, "r 4": {"r": 4}, "r 16": {"r": 16}, "dropout 0.3": {"dropout": 0.3}}


def snapshots(pristine: nn.Module, data, r: int, dropout: float, seed: int, label: str) -> list[dict[str, LayerRates]]:
    torch.manual_seed(seed)
    model = copy.deepcopy(pristine)
    nn.init.zeros_(model.head.weight)
    config = DashConfig(
        r=r,
        alpha=2 * r,
        dropout=dropout,
        directions=0,
        target_modules=r"encoder\.encoder\..*",
        trainable_modules=["head"],
    )
    apply_dash(model, config)
    generator = torch.Generator().manual_seed(seed)
    rows = data.training_rows()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, weight_decay=0.0)
    model.train()
    found = []
    for step in tqdm(range(1, STEPS[-1] + 1), desc=label, unit="step"):
        batch = rows[torch.randint(len(rows), (BATCH,), generator=generator)]
        loss = nn.functional.mse_loss(model(*data.inputs(batch)), data.rating[batch])
        optimizer.zero_grad()
        loss.backward()
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * min(1.0, step / 20)
        optimizer.step()
        if step in STEPS:
            found.append({name: rates(layer) for name, layer in dash_layers(model).items()})
    return found


@torch.no_grad()
def rates(layer) -> LayerRates:
    measured = change_rates(layer.weight_nk(), layer.lora_a, layer.lora_b, scaling=layer.scaling, method="exact")
    return LayerRates(measured.rate, measured.sigma)


def main() -> None:
    pristine, tokenizer = load_model()
    data = load_ratings(tokenizer)
    runs = {n: snapshots(pristine, data, **{**BASE, **change}, label=n) for n, change in VARIANTS.items()}
    console = Console(width=120)
    table = Table("run", *(f"step {s}" for s in STEPS), title="accuracy / recall against the same run's step 100")
    for name, found in runs.items():
        table.add_row(name, *(f"{a:.2f} / {r:.2f}" for a, r in agreement(found, found[-1])))
    console.print(table)
    table = Table("run", "accuracy", "recall", "common in the top 8", title="step 100 against the base run's step 100")
    for name, found in runs.items():
        ((accuracy, recall),) = agreement(found[-1:], runs["base"][-1])
        table.add_row(name, f"{accuracy:.2f}", f"{recall:.2f}", f"{overlap(found[-1], runs['base'][-1], 8):.2f}")
    console.print(table)
    tails = [float((r.top(8).double() / r.rate.numel()).median()) for r in runs["base"][-1].values()]
    print(f"median relative index of the top 8 (1 = smallest singular value): {statistics.median(tails):.3f}")


if __name__ == "__main__":
    main()
