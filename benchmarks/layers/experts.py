"""What adapters on experts' stacked parameters cost: a mixture's block beside PEFT's target_parameters and the frozen block.

    OMP_NUM_THREADS=1 python -m benchmarks.layers.experts [--quick] [--out benchmarks/results]

PEFT adds ΔW to the weights of all experts in every forward pass, and takes no dropout there; its block runs with either of
transformers' ways of computing experts, and so does the frozen one. Ours is LoRA-Dash after launch, with and without dropout.
Before anything is timed, outputs and gradients of the two are compared, with the same A and B.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from loradash import DashConfig, apply_dash, dash_layers
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from benchmarks.support.measure import environment, interleaved, saved_bytes, write_csv

RANK, DIRECTIONS, DROPOUT = 8, 8, 0.05
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
PARAMETERS = ["experts.gate_up_proj", "experts.down_proj"]
OURS, PLAIN_OURS = f"LoRA-Dash, dropout {DROPOUT}", "LoRA-Dash, dropout 0"
FROZEN, PEFT = "frozen, {}", "PEFT LoRA, {}"
WAYS = ("eager", "grouped_mm")


class Shape(NamedTuple):
    """A block: experts, of which each token takes `chosen`; widths; tokens of a step."""

    experts: int
    chosen: int
    hidden: int
    inner: int
    tokens: int

    def __str__(self) -> str:
        return f"{self.experts} experts, top {self.chosen}, {self.hidden} x {self.inner}, {self.tokens} tokens"


SHAPES = (Shape(8, 2, 512, 1024, 512), Shape(8, 2, 512, 1024, 2048), Shape(64, 4, 512, 256, 512))


def block(shape: Shape, dtype: torch.dtype, way: str) -> nn.Module:
    """Mixtral's block, frozen, with random weights."""
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    config = MixtralConfig(
        hidden_size=shape.hidden,
        intermediate_size=shape.inner,
        num_local_experts=shape.experts,
        num_experts_per_tok=shape.chosen,
    )
    config._experts_implementation = way
    torch.manual_seed(0)
    made = MixtralSparseMoeBlock(config)
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    return made.to(dtype).requires_grad_(False)


def ours(shape: Shape, dtype: torch.dtype, dropout: float) -> nn.Module:
    """The block after launch."""
    config = DashConfig(r=RANK, directions=DIRECTIONS, dropout=dropout, target_modules=[], target_parameters=PARAMETERS)
    model = apply_dash(nn.Sequential(block(shape, dtype, "grouped_mm")), config)
    with torch.no_grad():
        for layer in dash_layers(model).values():
            layer.launched.fill_(True)
            for t in (layer.lora_b, layer.dash_u, layer.dash_vt, layer.dash_sigma):
                nn.init.normal_(t, std=0.02)
    return model


def peft_block(shape: Shape, dtype: torch.dtype, way: str) -> nn.Module:
    """PEFT's LoRA, its adapters in the dtype of the weights: what it takes there."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=RANK, lora_alpha=16, target_modules=[], target_parameters=PARAMETERS, lora_dropout=0.0)
    model = get_peft_model(nn.Sequential(block(shape, dtype, way)), config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.02)
    return model.base_model.model


def same_adapters(model: nn.Module, peft_model: nn.Module) -> nn.Module:
    """Our block with the A and B of PEFT's, and no dash term."""
    wrappers = {m.parameter_name: m for m in peft_model.modules() if hasattr(m, "parameter_name")}
    with torch.no_grad():
        for name, layer in dash_layers(model).items():
            wrapper = wrappers[name.rpartition(".")[2]]
            experts = layer.weight.shape[0]
            a, b = wrapper.lora_A["default"].weight, wrapper.lora_B["default"].weight
            layer.lora_a.copy_(a.reshape(experts, RANK, -1))
            layer.lora_b.copy_(b.reshape(-1, RANK, experts).permute(2, 0, 1))
            layer.dash_sigma.zero_()
    return model


def check(shape: Shape) -> None:
    """Raises AssertionError where our block and PEFT's differ in output or gradients, in float32."""
    peft_model = peft_block(shape, torch.float32, "eager")
    model = same_adapters(ours(shape, torch.float32, 0.0), peft_model)
    x = torch.randn(1, shape.tokens, shape.hidden, generator=torch.Generator().manual_seed(1))
    found = []
    for one in (model, peft_model):
        leaf = x.clone().requires_grad_()
        y = one(leaf)
        y.square().mean().backward()
        found.append((y.detach(), leaf.grad))
    for a, b in zip(*found, strict=True):
        assert a is not None and b is not None
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4 * float(b.abs().max()))


class Arm:
    """A block with an input and the gradient of its output."""

    def __init__(self, model: nn.Module, shape: Shape, dtype: torch.dtype) -> None:
        draw = torch.Generator().manual_seed(2)
        self.model = model.train()
        self.x = torch.randn(1, shape.tokens, shape.hidden, generator=draw).to(dtype).requires_grad_()
        self.dy = torch.randn(1, shape.tokens, shape.hidden, generator=draw).to(dtype)

    def step(self) -> None:
        """Forward and backward."""
        self.model(self.x).backward(self.dy)
        self.x.grad = None
        for parameter in self.model.parameters():
            parameter.grad = None

    def saved_bytes(self) -> int:
        """Bytes kept for backward beside x, parameters and buffers."""
        return saved_bytes(lambda: self.model(self.x), (self.x, *self.model.parameters(), *self.model.buffers()))

    def flops(self) -> int:
        """FLOPs of the products of a step; those of transformers' grouped products are not counted by PyTorch."""
        with FlopCounterMode(display=False) as counted:
            self.step()
        return counted.get_total_flops()


def arms(shape: Shape, dtype: torch.dtype) -> dict[str, Arm]:
    """All variants, by name."""
    makers: dict[str, Callable[[], nn.Module]] = {}
    for way in WAYS:
        makers[FROZEN.format(way)] = lambda way=way: block(shape, dtype, way)
        # Expert by expert its backward fills a tensor of all experts' weights for each of them: with 64 experts some fifty
        # times a frozen step, which is left out.
        if way != "eager" or shape.experts <= 8:
            makers[PEFT.format(way)] = lambda way=way: peft_block(shape, dtype, way)
    makers[PLAIN_OURS] = lambda: ours(shape, dtype, 0.0)
    makers[OURS] = lambda: ours(shape, dtype, DROPOUT)
    return {name: Arm(make(), shape, dtype) for name, make in makers.items()}


def rows(rounds: int) -> list[dict[str, Any]]:
    """One row a dtype, shape and variant."""
    found = []
    cases = [(dtype, shape) for shape in SHAPES for dtype in DTYPES]
    for shape in SHAPES:
        check(shape)
    for dtype, shape in tqdm(cases, desc="experts", file=sys.stderr):
        built = arms(shape, DTYPES[dtype])
        times = interleaved({name: arm.step for name, arm in built.items()}, rounds, per_block=3, warm=1)
        fastest = min(times[FROZEN.format(way)] for way in WAYS)
        peft = min(times[name] for name in built if name.startswith("PEFT"))
        for name, arm in built.items():
            found.append(
                {
                    "dtype": dtype,
                    "shape": str(shape),
                    "variant": name,
                    "ms": 1e3 * times[name],
                    "over frozen": times[name] / fastest,
                    "over PEFT": times[name] / peft,
                    "saved bytes": arm.saved_bytes(),
                    "GFLOPs": "" if "grouped_mm" in name else arm.flops() / 1e9,
                }
            )
    return found


def table(found: list[dict[str, Any]]) -> str:
    """Markdown: ratios of time, saved bytes and FLOPs."""
    lines = [
        "A training step (forward and backward) of a mixture's block with adapters on both of its experts' parameters: time over the",
        f"faster of the two frozen blocks, and in brackets over the faster of PEFT's. Rank {RANK}, {DIRECTIONS} directions, one thread.",
        "",
        "| dtype | block | variant | over frozen (over PEFT) | MB saved for backward | GFLOPs |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in found:
        flops = f"{row['GFLOPs']:.1f}" if row["GFLOPs"] != "" else ""
        lines.append(
            f"| {row['dtype']} | {row['shape']} | {row['variant']} | {row['over frozen']:.2f} ({row['over PEFT']:.2f}) | "
            f"{row['saved bytes'] / 1e6:.1f} | {flops} |"
        )
    about = ", ".join(f"{key} {value}" for key, value in environment().items())
    return "\n".join([*lines, "", f"Measured with: {about}.", ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    parser.add_argument("--out", type=Path, help="folder for experts.csv and experts.md")
    options = parser.parse_args()
    found = rows(2 if options.quick else 5)
    print(table(found))
    if options.out:
        write_csv(options.out / "experts.csv", found)
        (options.out / "experts.md").write_text(table(found))


if __name__ == "__main__":
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)
    main()
