"""What is compared: ways to train one small LLaMA, each as its own users would set it up."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.layers.variants import ALPHA, DIRECTIONS, DROPOUT, RANK, SCALING
from loradash_kernels import Directions

from . import modelled
from .authors import AuthorsLinear
from .models import DTYPES, TARGETS, Shift, Sizes, make_model

FROZEN = "frozen"
PEFT = "PEFT LoRA"
PEFT_NARROW = "PEFT LoRA, adapters in bf16"
ACCELERATED = "PEFT LoRA, accelerated"
AUTHORS = "authors' LoRA-Dash"
DASH_LINEAR = "DashLinear"
LORADASH = "LORADASH through PEFT"
BEFORE = ", before launch"

# Launch is brought about, not waited for.
NEVER = 1 << 30
# B, and Δσ over the root of the width: the terms weigh as much as the base product, so that a loss tells if one is left out.
_ADAPTER_STD, _COORDINATE_STD = 0.08, 0.25


def _frozen(model: nn.Module, dropout: float) -> nn.Module:
    return model


def _peft(model: nn.Module, dropout: float, **options: Any) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=RANK, lora_alpha=ALPHA, lora_dropout=dropout, target_modules=list(TARGETS))
    return get_peft_model(model, config, **options)


def _peft_narrow(model: nn.Module, dropout: float) -> nn.Module:
    return _peft(model, dropout, autocast_adapter_dtype=False)


def _accelerated(model: nn.Module, dropout: float) -> nn.Module:
    from loradash.integrations.peft import accelerate

    model = _peft(model, dropout)
    accelerate(model)
    return model


def _authors(model: nn.Module, dropout: float) -> nn.Module:
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if name in TARGETS:
                setattr(parent, name, AuthorsLinear(child, RANK, DIRECTIONS, SCALING, dropout))
    return model


def _dash_linear(model: nn.Module, dropout: float) -> nn.Module:
    from loradash import DashConfig, apply_dash

    settings = DashConfig(
        r=RANK,
        alpha=ALPHA,
        directions=DIRECTIONS,
        dropout=dropout,
        prelaunch_steps=NEVER,
        target_modules=TARGETS,
    )
    return apply_dash(model, settings)


def _loradash(model: nn.Module, dropout: float) -> nn.Module:
    from loradash.integrations.peft import DashLoraConfig
    from peft import get_peft_model

    config = DashLoraConfig(
        r=RANK,
        lora_alpha=ALPHA,
        directions=DIRECTIONS,
        lora_dropout=dropout,
        prelaunch_steps=NEVER,
        target_modules=list(TARGETS),
    )
    return get_peft_model(model, config)


@dataclass(frozen=True)
class Arm:
    """A way to train.

    Attributes:
        kind: how `modelled` counts it.
        launched: has it directions?
        dtypes: the models that it is of interest for.
        ours: is it LoRA-Dash by loradash, trained with our callback?
    """

    name: str
    adapt: Callable[[nn.Module, float], nn.Module]
    kind: str
    launched: bool = False
    dtypes: tuple[str, ...] = tuple(DTYPES)
    ours: bool = False

    @property
    def directions(self) -> int:
        return DIRECTIONS if self.launched else 0


ARMS = {
    arm.name: arm
    for arm in (
        Arm(FROZEN, _frozen, modelled.FROZEN),
        Arm(PEFT, _peft, modelled.BY_OPERATORS),
        Arm(PEFT_NARROW, _peft_narrow, modelled.BY_OPERATORS, dtypes=("bf16",)),
        Arm(ACCELERATED, _accelerated, modelled.OURS),
        Arm(AUTHORS + BEFORE, _authors, modelled.AUTHORS),
        Arm(AUTHORS, _authors, modelled.AUTHORS, launched=True),
        Arm(DASH_LINEAR + BEFORE, _dash_linear, modelled.OURS, ours=True),
        Arm(DASH_LINEAR, _dash_linear, modelled.OURS, launched=True, ours=True),
        Arm(LORADASH + BEFORE, _loradash, modelled.OURS, ours=True),
        Arm(LORADASH, _loradash, modelled.OURS, launched=True, ours=True),
    )
}


def arms_for(sizes: Sizes, names: Sequence[str] = tuple(ARMS)) -> list[Arm]:
    """The arms of interest for a model, in the order of the table; the frozen one is always among them."""
    return [arm for arm in ARMS.values() if (arm.name in names or arm.name == FROZEN) and sizes.dtype in arm.dtypes]


def build(arm: Arm, sizes: Sizes, dropout: float = DROPOUT, fresh: bool = False) -> nn.Module:
    """The model of an arm.

    fresh: adapters as they come, which add nothing; else as after some training, with the same values in every arm, launched
    where the arm is.
    """
    model = arm.adapt(make_model(sizes), dropout)
    for module in model.modules():
        if isinstance(module, Shift):
            module.vector.requires_grad_(True)
    if arm.name != FROZEN and not fresh:
        _train_a_little(arm, model)
    return model


def callbacks_of(arm: Arm) -> list[Any]:
    """What the arm's users would give to the Trainer."""
    if not arm.ours:
        return []
    from loradash.integrations.transformers import DashCallback

    return [DashCallback(progress=False)]


@torch.no_grad()
def _train_a_little(arm: Arm, model: nn.Module) -> None:
    """Puts A and B, and directions with their coordinates, into every adapted layer: the same in the same order of layers."""
    draw = torch.Generator().manual_seed(1)
    for layer in adapted_layers(arm, model):
        a, b = _factors(layer)
        a.copy_(torch.randn(a.shape, generator=draw) * a.shape[1] ** -0.5)
        b.copy_(torch.randn(b.shape, generator=draw) * _ADAPTER_STD)
        found = _directions(b.shape[0], a.shape[1], draw)
        coordinates = torch.randn(DIRECTIONS, generator=draw) * _COORDINATE_STD * min(a.shape[1], b.shape[0]) ** 0.5
        if arm.launched:
            layer.launch(found)
            layer.dash_sigma.copy_(coordinates)


def _directions(n: int, k: int, draw: torch.Generator) -> Directions:
    """Orthonormal ones. Which they are makes no difference to what a step costs."""
    u, v = (torch.linalg.qr(torch.randn(side, DIRECTIONS, generator=draw))[0] for side in (n, k))
    unknown = torch.zeros(DIRECTIONS)
    return Directions(u, v.mT, unknown, unknown, unknown.long(), ())


def adapted_layers(arm: Arm, model: nn.Module) -> list[Any]:
    """The layers that the arm adapted, in the order of the model."""
    if arm.ours:
        from loradash.state import dash_layers

        return [*dash_layers(model).values()]
    return [m for m in model.modules() if isinstance(m, AuthorsLinear) or "default" in getattr(m, "lora_A", ())]


def _factors(layer: Any) -> tuple[Tensor, Tensor]:
    if hasattr(layer, "lora_a"):
        return layer.lora_a, layer.lora_b
    return layer.lora_A["default"].weight, layer.lora_B["default"].weight
