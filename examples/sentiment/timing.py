"""What a training step costs with every form of the adapter, on the same model and the same batch."""

from __future__ import annotations

import copy
import statistics
import time

import baselines
import torch
from data import BATCH, Ratings
from loradash import DashConfig, apply_dash
from loradash.devices import synchronize
from torch import nn
from tqdm.auto import tqdm

FROZEN = "frozen model, head only"


def step_times(
    pristine: nn.Module, data: Ratings, config: DashConfig, blocks: int, per_block: int = 2
) -> dict[str, float]:
    """Median seconds of a training step (forward, backward; batch of 32) of every form, blocks of each in turn.

    On a GPU a step ends when the GPU has done it.
    """
    models = variants(pristine, config)
    rows = data.training_rows()[:BATCH]
    (ids, mask), rating = data.inputs(rows), data.ratings(rows)
    times: dict[str, list[float]] = {name: [] for name in models}
    for block in tqdm(range(blocks + 1), desc="time per step", unit="block"):
        for name, model in models.items():
            model.train()
            for _ in range(per_block):
                synchronize(ids.device)
                start = time.perf_counter()
                nn.functional.mse_loss(model(ids, mask), rating).backward()
                synchronize(ids.device)
                # The first block warms up.
                if block:
                    times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def variants(pristine: nn.Module, config: DashConfig) -> dict[str, nn.Module]:
    """The model in every form, where the pristine one is."""
    return {
        FROZEN: _frozen(pristine),
        "PEFT LoRA": _peft(pristine, config),
        "LoRA-Dash, the paper's form": _baseline(pristine, baselines.DenseDash, config),
        "LoRA-Dash, factored in PyTorch": _baseline(pristine, baselines.FactoredDash, config),
        "LoRA-Dash, this package": apply_dash(copy.deepcopy(pristine), config),
    }


def name_of(device: torch.device) -> str:
    """What a device is called, with the software that a time depends on."""
    card = (
        f", {torch.cuda.get_device_name(device)}" if device.type == "cuda" else f", {torch.get_num_threads()} threads"
    )
    return f"{device}{card}, PyTorch {torch.__version__}"


def _frozen(pristine: nn.Module) -> nn.Module:
    """Gradients flow through the whole frozen encoder, as they must for any adapter in its first layer."""
    model = copy.deepcopy(pristine).requires_grad_(False)
    model.head.requires_grad_(True)
    model.encoder.embeddings.register_forward_hook(lambda module, inputs, output: output.requires_grad_(True))
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
