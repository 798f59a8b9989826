"""What stands beneath PEFT's tests: nothing, the accelerator, or our tuner in the place of LoraConfig."""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections import Counter
from collections.abc import Iterator
from typing import Any

import peft
import pytest
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
    values = given.params.values() if given else ()
    kinds = [value if isinstance(value, type) else type(value) for value in values]
    configs = [kind for kind in kinds if issubclass(kind, peft.PeftConfig)]
    return not configs or peft.LoraConfig in configs


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


SWITCHES: dict[str, type[Switch]] = {"off": Switch, "accelerated": Accelerated, "accelerate": Accelerate}
