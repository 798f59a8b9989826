"""Plain LoRA of PEFT on the fused operator: `accelerate(model)`, and `accelerated()` for a block of code.

    report = accelerate(peft_model)   # the layers compute on our operator from now on
    ...                               # train, evaluate, add adapters, save: PEFT's API and files are as before
    print(report)                     # which layers run fused, and why the others do not
    report.undo()

A layer's class becomes a subclass of `lora.Linear` that differs in `forward` alone. Every call asks whether the fused way
gives what PEFT's gives; where it does not, PEFT's own forward runs, and the report counts the reason:

- the whole layer: variants (DoRA, aLoRA, KaSA, ...), mixed batches (`adapter_names`), merged or disabled adapters, hooks on
  the parts of an adapter, weights or inputs that are subclasses of Tensor (DTensor, quantised), float64 adapters beside
  narrower inputs, a device without kernels, transforms of torch.func, tracing and exporting, hooks on all modules
  (FlopCounterMode sets some: it counts PEFT's FLOPs, which are the same);
- the base product alone, where the adapters' terms are one pass over its output: a base weight that trains, a base layer
  that is quantised, hooked, offloaded or has a forward of its own.

Where results differ from PEFT's: sums are rounded once, in the order of one kernel; adapters in float32 beside a base of 16
bits are read in 16 bits, as under autocast (their gradients come in float32); dropout keeps the probability, rounded to
1/65536, but draws other masks for a seed; gradients cannot be differentiated again (`create_graph=True` raises).
"""

from __future__ import annotations

import contextlib
import sys
import warnings
import weakref
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from .accelerated_layer import CALLS, AcceleratedLinear, Calls, Way, forward, listeners, pefts_forward, standing
from .layer import DashLoraLayer


@dataclass
class LayerReport:
    """One layer. expected: how its calls run as it stood when the report was made; calls: how they ran since."""

    name: str
    expected: Way
    calls: Counter[Way]
    layer: weakref.ref[nn.Module]
    changed: bool = False
    """Did the call that made this report change the layer's class?"""


@dataclass
class AccelerationReport:
    """Which layers run on the fused operator, and why not the others; prints as a table."""

    layers: dict[str, LayerReport] = field(default_factory=dict)

    @property
    def calls(self) -> Counter[Way]:
        """How many calls ran in which way, over all layers."""
        return sum((layer.calls for layer in self.layers.values()), Counter())

    @property
    def fused(self) -> int:
        """Calls whose base product and adapters ran as one operator."""
        return sum(count for way, count in self.calls.items() if way.how == "fused")

    def undo(self) -> None:
        """Gives the layers that this report's call changed back to PEFT. Again: no effect."""
        for entry in self.layers.values():
            layer = entry.layer() if entry.changed else None
            if layer is not None:
                _restore(layer)
            entry.changed = False

    def __str__(self) -> str:
        rows: list[tuple[str, ...]] = [("layer", "as it stands", "fused", "beside the base", "PEFT")]
        for entry in self.layers.values():
            counts = Counter[str]()
            for way, count in entry.calls.items():
                counts[way.how] += count
            rows.append((entry.name, _said(entry.expected), *(str(counts[how]) for how in rows[0][2:])))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        lines += [f"{count} calls {_said(way)}" for way, count in self.calls.most_common()]
        return "\n".join(lines)


def _said(way: Way) -> str:
    return f"{way.how}: {way.why}" if way.why else way.how


def accelerate(model: nn.Module) -> AccelerationReport:
    """Makes the plain LoRA layers of a PEFT model compute on the fused operator; state dict, files and API stay as they are.

    Layers that are accelerated already stay so, with their counts. An adapter that is added later to an accelerated layer
    is fused, too; for layers that get their first adapter later, call this again.

    Returns a report: print it, now and after a run. Its `undo()` gives the layers that this call changed back to PEFT,
    `decelerate(model)` all of them. Warns where no layer runs on the operator as the model stands. Layers of a LORADASH adapter
    do so without this call: they stay as they are.

    Raises TypeError for what is no module, ValueError for a model without adapters of PEFT, RuntimeError where somebody
    else has replaced the forward of `lora.Linear`; nothing is changed then.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    layers: dict[str, Any] = {n: layer for n, layer in model.named_modules() if isinstance(layer, BaseTunerLayer)}
    if not layers:
        raise ValueError(
            f"{type(model).__name__} has no adapters of PEFT; call get_peft_model(model, LoraConfig(...)) first"
        )
    _refuse_foreign_forward()
    report = AccelerationReport()
    for name, layer in layers.items():
        # One that was given back under a class made over ours (fully_shard, parametrize) has the class, and no counts.
        changed = type(layer) is LoraLinear or (isinstance(layer, AcceleratedLinear) and CALLS not in layer.__dict__)
        if changed:
            layer.__dict__[CALLS] = Calls()
        if type(layer) is LoraLinear:
            layer.__class__ = AcceleratedLinear
        report.layers[name] = _entry(name, layer, changed)
    if all(entry.expected.how == "PEFT" for entry in report.layers.values()):
        reasons = sorted({entry.expected.why for entry in report.layers.values()})
        warnings.warn(f"accelerate: no layer runs fused as the model stands: {'; '.join(reasons)}", stacklevel=2)
    return report


def _entry(name: str, layer: nn.Module, changed: bool) -> LayerReport:
    if isinstance(layer, AcceleratedLinear):
        expected = standing(layer)
    elif isinstance(layer, DashLoraLayer):
        expected = Way("LORADASH", "on the operator already; its calls are not counted")
    else:
        kind = f"{type(layer).__module__}.{type(layer).__qualname__}".removeprefix("peft.tuners.")
        expected = Way("PEFT", f"{kind} is not lora.Linear")
    return LayerReport(name, expected, layer.__dict__.get(CALLS, Calls()).ways, weakref.ref(layer), changed)


def decelerate(model: nn.Module) -> int:
    """Gives every accelerated layer of a model back to PEFT; returns how many there were."""
    layers = [module for module in model.modules() if isinstance(module, AcceleratedLinear)]
    accelerated_ones = sum(CALLS in layer.__dict__ for layer in layers)
    for layer in layers:
        _restore(layer)
    return accelerated_ones


def _restore(layer: nn.Module) -> None:
    # A class that was made over ours since (fully_shard, parametrize) finds no counts, and computes PEFT's way.
    layer.__dict__.pop(CALLS, None)
    if type(layer) is AcceleratedLinear:
        layer.__class__ = LoraLinear  # type: ignore[assignment]


def _refuse_foreign_forward() -> None:
    if LoraLinear.forward is _everywhere:
        return
    home = vars(sys.modules[LoraLinear.__module__])
    if getattr(LoraLinear.forward, "__globals__", None) is not home:
        raise RuntimeError(
            f"lora.Linear.forward was replaced by {getattr(LoraLinear.forward, '__module__', LoraLinear.forward)}: "
            "either that library or accelerate, not both"
        )


def _everywhere(self: LoraLinear, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """`lora.Linear.forward` inside `accelerated()`."""
    if type(self) is not LoraLinear:
        return pefts_forward(self, x, *args, **kwargs)
    return forward(self, x, *args, **kwargs)


@contextlib.contextmanager
def accelerated(model: nn.Module | None = None) -> Iterator[AccelerationReport]:
    """`accelerate(model)` for a block. Without a model: for every `lora.Linear` that is called inside the block, made before
    it or in it, in this process; no layer's class changes then, and the report names layers by their order of first use.
    A graph that torch.compile makes inside the block keeps the operator after it."""
    if model is not None:
        report = accelerate(model)
        try:
            yield report
        finally:
            report.undo()
        return
    _refuse_foreign_forward()
    report, entries = AccelerationReport(), weakref.WeakKeyDictionary[nn.Module, LayerReport]()

    def listen(layer: nn.Module, way: Way) -> None:
        entry = entries.get(layer)
        if entry is None:
            name = f"layer {len(report.layers)} ({layer.in_features} to {layer.out_features})"
            entry = entries[layer] = report.layers[name] = LayerReport(name, way, Counter(), weakref.ref(layer))
        entry.calls[way] += 1

    listeners.append(listen)
    LoraLinear.forward = _everywhere  # type: ignore[method-assign]
    try:
        yield report
    finally:
        listeners.remove(listen)
        if not listeners:
            LoraLinear.forward = pefts_forward  # type: ignore[method-assign]
