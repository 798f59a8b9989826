"""Linear layers of every kind that a model may hold."""

from __future__ import annotations

import pytest
import torch
from loradash import DashConfig
from support.quantised import quantised
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune

WIDTH = 32


def config(**settings):
    return DashConfig(**{"r": 4, "directions": 4, **settings})


class Renamed(nn.Linear):
    """A subclass that computes as nn.Linear does."""


class Scaled(nn.Linear):
    def forward(self, x):
        return 3 * super().forward(x)


class Richer(nn.Linear):
    """Computes as nn.Linear does, and has more for code outside to use."""

    def __init__(self, *args):
        super().__init__(*args)
        self.gain = nn.Parameter(torch.full((WIDTH,), 2.0))

    def doubled(self, x):
        return 2 * self(x)


class Called(nn.Linear):
    def __call__(self, x):
        return 2 * super().__call__(x)


class Tuple(nn.Linear):
    """Megatron's layers return their bias beside the output."""

    def forward(self, x):
        return super().forward(x), None


def linear():
    return nn.Linear(WIDTH, WIDTH)


def hooked():
    layer = linear()
    layer.register_forward_hook(lambda module, args, output: None)
    return layer


def renaming():
    layer = linear()
    layer.register_state_dict_post_hook(lambda module, state, prefix, _: state.update({f"{prefix}tag": torch.ones(1)}))
    return layer


def patched():
    layer = linear()
    layer.forward = lambda x: 2 * F.linear(x, layer.weight, layer.bias)
    return layer


def pruned():
    return prune.l1_unstructured(linear(), "weight", amount=0.5)


def parametrized():
    return nn.utils.parametrizations.weight_norm(linear())


def conv1d():
    return pytest.importorskip("transformers.pytorch_utils").Conv1D(WIDTH, WIDTH)


def bitnet():
    layer = pytest.importorskip("transformers.integrations.bitnet").AutoBitLinear(WIDTH, WIDTH, bias=False)
    layer.weight.data = torch.randint(-1, 2, (WIDTH, WIDTH)).float()
    layer.weight_scale.fill_(0.05)
    return layer


def packed_bitnet():
    return pytest.importorskip("transformers.integrations.bitnet").BitLinear(WIDTH, WIDTH, bias=False)


def in_format(name):
    return quantised(name, n=WIDTH, k=WIDTH)


def unquantised():
    return pytest.importorskip("bitsandbytes").nn.Linear4bit(WIDTH, WIDTH)


def offloaded():
    accelerate = pytest.importorskip("accelerate")
    model = nn.Sequential(linear())
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    return model[0]


LAYERS = {
    "`nn.Linear`": (linear, "adopted"),
    "subclass of `nn.Linear` that inherits its forward": (lambda: Renamed(WIDTH, WIDTH), "adopted"),
    "transformers' `Conv1D`": (conv1d, "adopted"),
    "subclass with a forward of its own (FP8, QAT, routers, ...)": (lambda: Scaled(WIDTH, WIDTH), "kept whole"),
    "subclass with methods, parameters or buffers of its own": (lambda: Richer(WIDTH, WIDTH), "kept whole"),
    "subclass with a `__call__` of its own": (lambda: Called(WIDTH, WIDTH), "kept whole"),
    "transformers' `AutoBitLinear` (BitNet)": (bitnet, "kept whole"),
    "transformers' `BitLinear` (BitNet, packed)": (packed_bitnet, "refused"),
    "torchao int8 weight": (lambda: in_format("torchao-int8"), "kept whole"),
    "torchao int4 weight": (lambda: in_format("torchao-int4"), "kept whole"),
    "torchao float8 weight": (lambda: in_format("torchao-fp8"), "kept whole"),
    "bitsandbytes `Linear4bit`": (lambda: in_format("bitsandbytes-nf4-double"), "kept whole"),
    "bitsandbytes `Linear8bitLt`": (lambda: in_format("bitsandbytes-int8"), "kept whole"),
    "either of these before it is quantised, or on meta": (unquantised, "refused"),
    "layer with forward or backward hooks": (hooked, "kept whole"),
    "layer with hooks on its state dict": (renaming, "kept whole"),
    "layer whose `forward` was patched": (patched, "kept whole"),
    "layer that accelerate offloads": (offloaded, "kept whole"),
    "parametrized layer (`weight_norm`, ...)": (parametrized, "kept whole"),
    "pruned layer (`torch.nn.utils.prune`)": (pruned, "kept whole"),
    "`nn.LazyLinear` before its first call": (lambda: nn.LazyLinear(WIDTH), "refused"),
}


def standardised():
    """A convolution with a forward of its own."""
    return type("Standardised", (nn.Conv2d,), {"forward": lambda self, x: 2 * super().forward(x)})(8, 8, 1)


# Named layers that are not linear, by their rows in the table of docs/layers.md: instances, and what becomes of them.
NAMED = {
    "`nn.Conv1d`, `nn.Conv2d`, `nn.Conv3d` with kernel 1, one group and no padding": (
        lambda: [nn.Conv1d(8, 8, 1), nn.Conv2d(8, 8, 1, stride=2), nn.Conv3d(8, 8, 1, padding="same")],
        "adapted",
    ),
    "any other convolution, transposed ones too": (
        lambda: [
            nn.Conv2d(8, 8, 3),
            nn.Conv2d(8, 8, (1, 3)),
            nn.Conv2d(8, 8, 1, groups=2),
            nn.Conv1d(8, 8, 1, padding=1),
            nn.ConvTranspose2d(8, 8, 1),
            parametrizations.weight_norm(nn.Conv2d(8, 8, 1, bias=False)),
            standardised(),
        ],
        "refused",
    ),
    "`nn.Embedding`, `nn.EmbeddingBag`, `nn.Bilinear`": (
        lambda: [nn.Embedding(8, 8), nn.EmbeddingBag(8, 8), nn.Bilinear(8, 8, 8)],
        "refused",
    ),
    "`nn.LSTM`, `nn.GRU`, `nn.RNN` and their cells": (
        lambda: [kind(8, 8) for kind in (nn.LSTM, nn.GRU, nn.RNN, nn.LSTMCell, nn.GRUCell, nn.RNNCell)],
        "refused",
    ),
    "`nn.MultiheadAttention` itself, whose `in_proj_weight` is one matrix for three": (
        lambda: [nn.MultiheadAttention(8, 2)],
        "refused",
    ),
    "norms and whatever has parameters of its own": (
        lambda: [nn.LayerNorm(8), nn.BatchNorm2d(8), nn.PReLU()],
        "refused",
    ),
}
