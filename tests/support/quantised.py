"""Quantised linear layers of every format that a CPU runs, and what each stands for by its definition."""

from __future__ import annotations

import pytest
import torch
from loradash import DashConfig, DashLinear
from torch import nn

from loradash_kernels.testing import allowances, formula, make_case

N, K = 96, 128


def config(**settings):
    return DashConfig(**{"r": 4, "directions": 3, "prelaunch_steps": 2, **settings})


def four_bit(plain, dtype, **options):
    bnb = pytest.importorskip("bitsandbytes")
    options = {"quant_type": "nf4", "compute_dtype": dtype, **options}
    layer = bnb.nn.Linear4bit(plain.in_features, plain.out_features, plain.bias is not None, **options)
    # Its constructor takes no dtype; what is loaded has the values alone.
    layer.weight.data = plain.weight.data.clone()
    if plain.bias is not None:
        layer.bias.data = plain.bias.data.clone()
    return layer


def eight_bit(plain, **options):
    bnb = pytest.importorskip("bitsandbytes")
    layer = bnb.nn.Linear8bitLt(
        plain.in_features, plain.out_features, plain.bias is not None, has_fp16_weights=False, **options
    )
    layer.weight.data = plain.weight.data.clone()
    if plain.bias is not None:
        layer.bias.data = plain.bias.data.clone()
    return layer


def torchao(plain, make):
    quantization = pytest.importorskip("torchao.quantization")
    model = nn.Sequential(plain)
    try:
        quantization.quantize_(model, make(quantization))
        with torch.no_grad():
            model(torch.zeros(1, plain.in_features, dtype=plain.weight.dtype))
    # Release 0.16 fails in the first call of a layer whose int8 codes come in groups.
    except (AttributeError, ImportError, NotImplementedError, RuntimeError) as error:
        pytest.skip(f"this torchao has no such format here: {error}")
    return model[0]


# By name; each is given an nn.Linear and the dtype of the activations.
FORMATS = {
    "bitsandbytes-nf4": lambda plain, dtype: four_bit(plain, dtype, compress_statistics=False),
    "bitsandbytes-nf4-double": four_bit,
    "bitsandbytes-fp4-stored-as-bfloat16": lambda plain, dtype: four_bit(
        plain, dtype, quant_type="fp4", quant_storage=torch.bfloat16
    ),
    "bitsandbytes-int8": lambda plain, dtype: eight_bit(plain),
    "bitsandbytes-int8-threshold": lambda plain, dtype: eight_bit(plain, threshold=6.0),
    "torchao-int8": lambda plain, dtype: torchao(plain, lambda q: q.Int8WeightOnlyConfig(version=2)),
    "torchao-int8-groups": lambda plain, dtype: torchao(
        plain, lambda q: q.Int8WeightOnlyConfig(granularity=q.PerGroup(32), version=2)
    ),
    "torchao-int4": lambda plain, dtype: torchao(
        plain, lambda q: q.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=q.PerGroup(32))
    ),
    "torchao-fp8": lambda plain, dtype: torchao(plain, lambda q: q.Float8WeightOnlyConfig()),
}


def quantised(name, dtype=torch.float32, n=N, k=K, bias=True):
    """A frozen layer of a format, quantised on the CPU."""
    torch.manual_seed(n + k)
    plain = nn.Linear(k, n, bias).to(dtype).requires_grad_(False)
    return FORMATS[name](plain, dtype).to("cpu").requires_grad_(False)


def truth(layer):
    """The W (N, K) of a layer in float64, from its codes by the definition of the format."""
    weight, shape = layer.weight, (layer.out_features, layer.in_features)
    if hasattr(weight, "quant_state"):
        return _four_bits(weight, weight.quant_state).view(shape)
    if hasattr(layer, "state"):
        scale = weight.SCB if weight.SCB is not None else layer.state.SCB
        return weight.data.double() * scale.double()[:, None] / 127
    scale = _spread(weight.scale.double(), shape)
    zero = getattr(weight, "zero_point", None)
    return (weight.qdata.double() - (0 if zero is None else _spread(zero.double(), shape))) * scale


def _four_bits(weight, state):
    codes = weight.data.contiguous().view(torch.uint8).flatten().long()
    # The first of two codes is in the upper half of a byte.
    values = state.code.double()[torch.stack([codes >> 4, codes & 15], dim=1).flatten()]
    scale = state.absmax.double()
    if state.nested:
        blocks = state.state2.absmax.double().repeat_interleave(state.state2.blocksize)[: len(scale)]
        scale = state.state2.code.double()[state.absmax.long()] * blocks + state.offset.double()
    return values * scale.repeat_interleave(state.blocksize)[: len(values)]


def _spread(blocks, shape):
    rows, columns = (side // blocks.shape[i] for i, side in enumerate(shape))
    return blocks.repeat_interleave(rows, 0).repeat_interleave(columns, 1)


def adapted(layer, case, **settings):
    """A DashLinear around a layer with the adapters of a case."""
    dash = DashLinear.from_linear(layer, config(alpha=4 * case.scaling, dropout=case.dropout_p, **settings))
    for name in ("lora_a", "lora_b", "dash_sigma", "dash_u", "dash_vt"):
        getattr(dash, name).data.copy_(case.tensors[name])
    return dash


def case_of(layer, dtype, dropout_p=0.0):
    """A problem over the weight that a layer stands for."""
    k, n = layer.in_features, layer.out_features
    case = make_case(
        24, k, n, 4, 3, dtype, adapter_dtype=torch.float32, bias=layer.bias is not None, dropout_p=dropout_p
    )
    case.tensors |= {"weight": truth(layer), "bias": layer.bias}
    return case


def results(forward, dash, case):
    """Output and gradients of `forward`, by name."""
    x = case.x.clone().requires_grad_()
    torch.manual_seed(case.seed)
    y = forward(x)
    y.backward(case.dy.to(y.dtype))
    gradients = {name: getattr(dash, name).grad for name in ("lora_a", "lora_b", "dash_sigma")}
    return {"y": y.detach(), "x": x.grad, **gradients}


def check(ours, case, computed=None):
    """The error rule of `dash_linear` over the dequantised weight. The base layer may round its weight, its scales and its
    sums besides, to the dtype that it computes in."""
    exact, allowed = formula(case, torch.float64), allowances(case)
    unit = torch.finfo(computed or case.x.dtype).eps
    x, dy, weight = (t.double().abs() for t in (case.x, case.dy, case.tensors["weight"]))
    allowed["y"] = allowed["y"] + 4 * unit * x @ weight.t()
    allowed["x"] = allowed["x"] + 4 * unit * dy @ weight
    if case.tensors["bias"] is not None:
        allowed["y"] = allowed["y"] + unit * case.tensors["bias"].double().abs()
    for name, value in ours.items():
        error = (value.double() - exact[name]).abs()
        assert bool((error <= allowed[name]).all()), (
            f"{name}: {(error / allowed[name]).nan_to_num().max():.3g} of what is allowed"
        )
