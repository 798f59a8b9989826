"""Our layer by every backend, and by every strategy that a backend would let the tuner choose from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from loradash import DashLinear
from torch import Tensor, nn

from benchmarks.layers.variants import Case
from loradash_kernels import dash_linear
from loradash_kernels.backends import cuda, registry, tuning
from loradash_kernels.backends.triton import backend as triton
from loradash_kernels.backends.triton import strategies
from loradash_kernels.backends.triton.problem import Problem
from loradash_kernels.calls import BackwardCall, Call, ForwardCall
from loradash_kernels.random import draw_seed, dropout_threshold

PASSES = ("forward", "backward")


def names(device: torch.device) -> tuple[str, ...]:
    """The backends that are timed on a device; on the CPU Triton's too, where its interpreter is asked for."""
    if device.type == "cuda":
        return "cuda", "triton"
    return ("cpu", "reference", "triton") if triton.interpreted() else ("cpu", "reference")


def refusal(name: str, x: Tensor, width: int) -> str | None:
    """Why a backend cannot take this x and R = `width`, or None."""
    backend = next(backend for backend in registry.BACKENDS if backend.name == name)
    return backend.missing() or backend.refuses(x, width)


class ByBackend(nn.Module):
    """A DashLinear whose calls name their backend."""

    def __init__(self, layer: DashLinear, backend: str) -> None:
        super().__init__()
        self.layer, self.backend = layer, backend

    def __getattr__(self, name: str) -> Any:
        """Its tensors are the layer's."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("layer"), name)

    def forward(self, x: Tensor) -> Tensor:
        layer = self.layer
        return dash_linear(
            x,
            layer.weight,
            layer.bias,
            lora_a=layer.lora_a,
            lora_b=layer.lora_b,
            dash_u=layer.dash_u,
            dash_vt=layer.dash_vt,
            dash_sigma=layer.dash_sigma,
            scaling=layer.config.scaling,
            dropout_p=layer.config.dropout,
            training=self.training,
            backend=self.backend,
        )


def by_backend(case: Case, backend: str) -> Case:
    assert isinstance(case.layer, DashLinear)
    return Case(ByBackend(case.layer, backend), case.x, case.dy)


def calls_of(case: Case) -> tuple[ForwardCall, BackwardCall]:
    """The calls that a step of ours makes, all gradients but the bias's wanted."""
    layer, x = case.layer, case.x.detach()
    assert isinstance(layer, DashLinear)
    threshold = dropout_threshold(layer.config.dropout)
    seed = draw_seed(x.device) if threshold else None
    adapters = tuple(t.detach() for t in (layer.lora_a, layer.lora_b, layer.dash_u, layer.dash_vt, layer.dash_sigma))
    a, b, _, _, sigma = adapters
    p = x.new_empty(x.shape[0], len(a) + len(sigma), dtype=torch.float32)
    options = (seed, layer.config.scaling, threshold)
    forward = ForwardCall(x, layer.weight, None, *adapters, *options, None, torch.empty_like(case.dy), p)
    gradients = (torch.empty_like(x), *(t.new_empty(t.shape, dtype=torch.float32) for t in (a, b, sigma)), None)
    return forward, BackwardCall(case.dy, x, layer.weight, *adapters, p, *options, *gradients)


def _triton_candidates(call: Call) -> list[Any]:
    target = triton.target_of(call.x.device)
    return [] if target is None else list(strategies.candidates(Problem(call, target)))


CANDIDATES: dict[str, Callable[[Call], list[Any]]] = {
    "cuda": cuda.candidates,
    "triton": _triton_candidates,
}


@dataclass(frozen=True)
class Arm:
    """A backend and, for the passes that it is a candidate of, the strategy that is forced; none: what the backend does
    unasked."""

    name: str
    backend: str
    forced: tuple[tuple[str, Any], ...] = ()

    @property
    def passes(self) -> tuple[str, ...]:
        return tuple(pass_ for pass_, _ in self.forced) or PASSES

    def case(self, ours: Case) -> Case:
        found = by_backend(ours, self.backend)
        if self.forced:
            found.within = lambda: tuning.forced(self.backend, **dict(self.forced))
        return found


def arms_of(case: Case) -> list[Arm]:
    """Every strategy of every backend that takes this case, and each backend as it is."""
    device, width = case.x.device, case.layer.lora_a.shape[0] + case.layer.dash_sigma.shape[0]
    found = []
    for name in names(device):
        if refusal(name, case.x, width):
            continue
        found.append(Arm(name, name))
        by_label: dict[str, dict[str, Any]] = {}
        for call in calls_of(case) if name in CANDIDATES else ():
            for candidate in CANDIDATES[name](call):
                by_label.setdefault(label(name, candidate), {})[call.pass_] = candidate
        found += [Arm(words, name, tuple(forced.items())) for words, forced in by_label.items()]
    return found


def label(backend: str, candidate: Any) -> str:
    """ "triton fused 128x128x32, 8 warps, 3 stages", "cuda library"."""
    if not isinstance(candidate, strategies.Strategy):
        return f"{backend} {candidate}"
    tile = candidate.tile
    if tile is None:
        return f"{backend} {candidate.kind}"
    sides = f"{tile.block_m}x{tile.block_n}x{tile.block_k}"
    return f"{backend} {candidate.kind} {sides}, {tile.num_warps} warps, {tile.num_stages} stages"
