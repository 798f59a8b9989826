"""PEFT layers whose tensors are those of a case of the error rule, and what they give and cost."""

from __future__ import annotations

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from loradash_kernels.testing import make_case

RANK, SCALING = 4, 2.0


def adapted(net, names=("default",), *, active=None, **settings):
    """A network with one LoRA adapter for each name, all of them active unless `active` says which; A and B are random."""
    config = {"r": RANK, "lora_alpha": RANK * SCALING, "init_lora_weights": False, **settings}
    if "target_modules" not in config:
        config["target_modules"] = [
            name for name, module in net.named_modules() if isinstance(module, (nn.Linear, Conv1D))
        ]
    model = get_peft_model(net, LoraConfig(**config), adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, LoraConfig(**config))
    model.base_model.set_adapter(list(active or names))
    return model


class Problem:
    """A case without directions as a PEFT layer: the case's ranks are shared out over the adapters.

    scalings: one for each adapter, powers of two, so that B can hold the case's scaling without rounding.
    lora_bias: with biases of B; they, the base layer's and every sum of them are multiples of 1/8.
    """

    def __init__(
        self,
        dtype,
        adapter_dtype,
        *,
        scalings=(SCALING,),
        conv1d=False,
        bias=True,
        lora_bias=False,
        train_bias=False,
        rslora=False,
        rows=6,
        k=40,
        n=24,
    ):
        self.case = make_case(
            rows,
            k,
            n,
            RANK * len(scalings),
            0,
            dtype,
            adapter_dtype=adapter_dtype,
            bias=bias or lora_bias,
            scaling=RANK**0.5 * SCALING if rslora else SCALING,
        )
        base = Conv1D(n, k) if conv1d else nn.Linear(k, n, bias=bias)
        names = [f"adapter{i}" for i in range(len(scalings))]
        net = nn.Sequential(base.to(dtype))
        self.model = adapted(net, names, lora_bias=lora_bias, use_rslora=rslora)
        self.layer, self.scalings = self.model.base_model.model[0], scalings
        tensors, b_biases = self.case.tensors, []
        for i, (name, scaling) in enumerate(zip(names, scalings, strict=True)):
            part, a, b = slice(i * RANK, (i + 1) * RANK), self.layer.lora_A[name], self.layer.lora_B[name]
            if not rslora:
                self.layer.scaling[name] = scaling
            a.weight = nn.Parameter(tensors["lora_a"][part].clone())
            b.weight = nn.Parameter(tensors["lora_b"][:, part] * (SCALING / scaling))
            if lora_bias:
                b.bias = nn.Parameter(torch.randint(-4, 5, (n,)).to(adapter_dtype or dtype) / 8)
                b_biases.append(b.bias.detach() * scaling)
        if bias and lora_bias:
            tensors["bias"] = torch.randint(-8, 9, (n,)).to(dtype) / 8
        with torch.no_grad():
            base.weight.copy_(tensors["weight"].t() if conv1d else tensors["weight"])
            if bias:
                base.bias.copy_(tensors["bias"])
            if lora_bias:
                tensors["bias"] = (sum(b_biases) + (base.bias if bias else 0)).to(dtype)
        self.trained_bias = base.bias if train_bias else None
        if train_bias:
            base.bias.requires_grad_()

    def run(self):
        """The case's output and gradients, from the layer as it is now; the gradients keep the dtypes that they came in."""
        x = self.case.x.clone().requires_grad_()
        self.model.zero_grad()
        y = self.layer(x)
        y.backward(self.case.dy)
        parts = [
            (self.layer.lora_A[n], self.layer.lora_B[n], s)
            for n, s in zip(self.layer.lora_A, self.scalings, strict=True)
        ]
        found = {
            "y": y.detach(),
            "x": x.grad,
            "lora_a": torch.cat([a.weight.grad for a, _, _ in parts]),
            "lora_b": torch.cat([b.weight.grad * (SCALING / s) for _, b, s in parts], 1),
        }
        biases = [b.bias.grad / s for _, b, s in parts if b.bias is not None]
        if self.trained_bias is not None:
            biases.append(self.trained_bias.grad)
        for grad in biases:
            torch.testing.assert_close(grad.double(), biases[0].double())
            found["bias"] = grad
        return found


def gap(ours, theirs):
    """The largest distance of two sets of tensors, relative to the second's norms."""
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert value.dtype == theirs[name].dtype and value.shape == theirs[name].shape, name
    return max(float((ours[n].double() - t.double()).norm() / (t.double().norm() + 1e-30)) for n, t in theirs.items())
