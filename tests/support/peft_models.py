"""Small models for PEFT, LORADASH adapters in them, and the formula that they stand for in float64."""

from __future__ import annotations

import copy
import functools
from typing import Any

import loradash
import torch
from loradash.integrations.peft import DashLoraConfig
from peft import get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

WIDTH, INNER, OUT = 24, 40, 12
X = torch.randn(6, WIDTH, generator=torch.Generator().manual_seed(1))
TOLERANCE = 2e-5
IDS = torch.randint(0, 48, (4, 8), generator=torch.Generator().manual_seed(2))


class Net(nn.Module):
    """Linear with a bias, Conv1D, Linear without; a head that no adapter takes."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(WIDTH, INNER)
        self.middle = Conv1D(INNER, INNER)
        nn.init.normal_(self.middle.weight, std=0.2)
        self.last = nn.Linear(INNER, OUT, bias=False)
        self.head = nn.Linear(OUT, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.first(x.to(self.head.weight.dtype)))
        return self.head(self.last(torch.tanh(self.middle(x))))


def config(**settings: Any) -> DashLoraConfig:
    return DashLoraConfig(
        **{"r": 4, "directions": 3, "prelaunch_steps": 2, "target_modules": ["first", "middle", "last"], **settings}
    )


def adapted(**settings: Any) -> Any:
    return get_peft_model(Net(), config(**settings))


def llama(**settings: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**{**sizes, "vocab_size": 48, **settings}))


def llama_config(**settings: Any) -> DashLoraConfig:
    return config(**{"target_modules": "all-linear", "task_type": "CAUSAL_LM", **settings})


def loss_of(model: nn.Module) -> Tensor:
    if hasattr(model, "lm_head"):
        return model(input_ids=IDS, labels=IDS).loss
    return model(X).pow(2).mean()


def output(model: nn.Module, **kwargs: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, **kwargs).logits if hasattr(model, "lm_head") else model(X, **kwargs)


def train(model: Any, steps: int = 3, lr: float = 0.05, schedule: Any = None) -> Any:
    """AdamW's steps and the schedule's, then the model in evaluation."""
    schedule = schedule or loradash.DashSchedule(model, progress=False)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        loss_of(model).backward()
        optimizer.step()
        schedule.step()
    return model.eval()


def formula(layer: Any, adapters: list[str], x: Tensor) -> Tensor:
    """base(x) + Σ scaling · x Aᵀ Bᵀ + Σ_i Δσ_i (x · v_i) u_iᵀ in float64, from the tensors of a layer."""
    base, x = layer.get_base_layer(), x.double()
    weight = base.weight.t() if isinstance(base, Conv1D) else base.weight
    y = F.linear(x, weight.double(), None if base.bias is None else base.bias.double())
    for name in adapters:
        if name not in layer.lora_A:
            continue
        a, b = layer.lora_A[name].weight.double(), layer.lora_B[name]
        y = y + layer.scaling[name] * (x @ a.t() @ b.weight.double().t())
        if b.bias is not None:
            y = y + layer.scaling[name] * b.bias.double()
        u, vt, sigma = (getattr(layer, f"lora_dash_{part}")[name].double() for part in ("u", "vt", "sigma"))
        y = y + (x @ vt.t() * sigma) @ u.t()
    return y


def layers_of(model: nn.Module) -> dict[str, Any]:
    return {name: m for name, m in model.named_modules() if "lora_dash_sigma" in m._modules}


def gap(a: Tensor, b: Tensor) -> float:
    return float((a.detach().double() - b.detach().double()).abs().max())


def two_adapters() -> Any:
    """A trained network with two launched adapters, "default" and "other", of which the first is active."""
    return copy.deepcopy(_two_adapters())


@functools.cache
def _two_adapters() -> Any:
    model = train(adapted())
    model.add_adapter("other", config(r=2, directions=5, lora_alpha=3))
    model.set_adapter("other")
    train(model, 4)
    model.set_adapter("default")
    return model


def check_layers(
    model: nn.Module, adapters: list[str], tolerance: float = TOLERANCE, dtype: torch.dtype = torch.float32
) -> None:
    """Does every layer compute the formula?"""
    for name, layer in layers_of(model).items():
        x = torch.randn(5, layer.in_features, generator=torch.Generator().manual_seed(3), dtype=dtype)
        want = formula(layer, adapters, x)
        assert gap(layer(x), want) < tolerance * float(want.abs().max()), name
