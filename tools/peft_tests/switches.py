"""What stands beneath PEFT's tests: nothing, the accelerator, or our tuner in the place of LoraConfig."""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import peft
import pytest
import torch
from peft.tuners.tuners_utils import BaseTuner
from torch import nn


class Switch:
    """PEFT alone. The others extend it."""

    def name(self, test: str) -> str:
        """A test's name as PEFT's own run has it."""
        return test

    def begin(self) -> None:
        """Before a test."""

    def end(self) -> Counter[str]:
        """After it: how many calls of layers ran in which way, such as "fused" or "PEFT: merged"."""
        return Counter()


def concerns(item: pytest.Item) -> bool:
    """Whether a test can reach a layer of plain LoRA: not one for the configuration classes of other tuners alone."""
    given = getattr(item, "callspec", None)
    found = configurations(given.params.values() if given else ())
    return not found or peft.LoraConfig in found


def configurations(values: Iterable[Any]) -> list[type]:
    kinds = [value if isinstance(value, type) else type(value) for value in values]
    return [kind for kind in kinds if issubclass(kind, peft.PeftConfig)]


def keep_plain_lora(markers: Iterable[Any]) -> None:
    """Takes the rows for other tuners out of a test's `parametrize` marks, which the tests of a file share: of PEFT's 20000
    tests in a file 17000 are not wanted, and making them takes longer than running a part."""
    found = []
    for marker in markers:
        rows = marker.args[1] if len(marker.args) > 1 else None
        if isinstance(rows, list) and not isinstance(marker.kwargs.get("ids"), list | tuple):
            kinds = [configurations(row if isinstance(row, tuple) else (row,)) for row in rows]
            if any(kinds):
                found.append(
                    (rows, [row for row, has in zip(rows, kinds, strict=True) if not has or peft.LoraConfig in has])
                )
    # Of two marks with configurations, one may have plain LoRA's for the other; and without rows pytest would skip the test.
    if len(found) == 1 and found[0][1]:
        rows, kept = found[0]
        rows[:] = kept


class Accelerated(Switch):
    """Every test runs inside the block."""

    def begin(self) -> None:
        from loradash.integrations.peft import accelerated

        self.block = contextlib.ExitStack()
        self.reports = [self.block.enter_context(accelerated())]

    def end(self) -> Counter[str]:
        self.block.close()
        calls = Counter[str]()
        # A layer is in the report of every call that found it, with the same counts.
        counts = {id(entry.calls): entry.calls for report in self.reports for entry in report.layers.values()}
        for layer_calls in counts.values():
            for way, count in layer_calls.items():
                calls[": ".join(filter(None, way))] += count
        return calls


class Accelerate(Accelerated):
    """Every model is accelerated as soon as an adapter was put into it, and so are models that get one more."""

    def begin(self) -> None:
        from loradash.integrations.peft import accelerate

        self.block = contextlib.ExitStack()
        self.reports = []
        inject = BaseTuner.inject_adapter

        @functools.wraps(inject)
        def inject_and_accelerate(tuner: Any, model: nn.Module, *arguments: Any, **named: Any) -> Any:
            done = inject(tuner, model, *arguments, **named)
            with warnings.catch_warnings():
                # That no layer of a model can be fused is counted here, and tests of warnings expect PEFT's.
                warnings.simplefilter("ignore")
                self.reports.append(accelerate(model))
            return done

        self.block.enter_context(replaced(BaseTuner, "inject_adapter", inject_and_accelerate))


@contextlib.contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


class Loradash(Switch):
    """PEFT's tests find `DashLoraConfig` under the name of LoraConfig: what they ask of that class, they ask of ours."""

    def __init__(self) -> None:
        from loradash.integrations.peft import DashLoraConfig, layer

        self.ways = Counter[str]()
        vars(peft).update(LoraConfig=DashLoraConfig)
        for owner, name, way in (
            (layer, "with_base", "fused"),
            (layer, "beside_base", "beside the base"),
            (layer.DashLoraLayer, "_added", "PyTorch's operators"),
        ):
            setattr(owner, name, self.counted(getattr(owner, name), way))

    def counted(self, function: Callable[..., Any], way: str) -> Callable[..., Any]:
        @functools.wraps(function)
        def counting(*arguments: Any, **named: Any) -> Any:
            self.ways[way] += 1
            return function(*arguments, **named)

        return counting

    def name(self, test: str) -> str:
        return test.replace("DashLora", "Lora")

    def begin(self) -> None:
        self.ways.clear()

    def end(self) -> Counter[str]:
        return self.ways.copy()


class Launched(Loradash):
    """Every adapter that is not to start as the identity starts launched, with directions and Δσ ≠ 0."""

    def __init__(self) -> None:
        super().__init__()
        from loradash.integrations.peft import DashLoraModel
        from loradash.integrations.peft.layer import DashLoraLayer

        add, combine = DashLoraLayer.add_dash_term, DashLoraModel.add_weighted_adapter

        @functools.wraps(add)
        def add_launched(layer: Any, adapter_name: str, config: Any) -> None:
            add(layer, adapter_name, config)
            if config.init_lora_weights is False and not layer.lora_A[adapter_name].weight.is_meta:
                launch(layer, adapter_name)

        @functools.wraps(combine)
        def combine_before_launch(*arguments: Any, **named: Any) -> None:
            # An adapter that PEFT computes from others is before launch, as they are folded into it.
            with replaced(DashLoraLayer, "add_dash_term", add):
                combine(*arguments, **named)

        for owner, name, value in (
            (DashLoraLayer, "add_dash_term", add_launched),
            (DashLoraModel, "add_weighted_adapter", combine_before_launch),
        ):
            setattr(owner, name, value)


@torch.no_grad()
def launch(layer: Any, adapter: str) -> None:
    """Directions and Δσ that follow from A: equal where a test seeds A equally, others in a layer that a file is loaded into,
    so that a file which lacks them is found out."""
    a = layer.lora_A[adapter].weight
    generator = torch.Generator().manual_seed(int(a.detach().double().abs().sum().mul(2**20).item()) % 2**62)
    for name, axis in (("lora_dash_u", 0), ("lora_dash_vt", 1)):
        vectors = getattr(layer, name)[adapter]
        vectors.copy_(torch.nn.functional.normalize(torch.randn(vectors.shape, generator=generator), dim=axis))
    sigma = layer.lora_dash_sigma[adapter]
    sigma.copy_(torch.randn(sigma.shape, generator=generator))
    layer.lora_dash_launched[adapter].fill_(True)


SWITCHES: dict[str, type[Switch]] = {
    "off": Switch,
    "accelerated": Accelerated,
    "accelerate": Accelerate,
    "loradash": Loradash,
    "launched": Launched,
}
