"""The end of the pre-launch phase: finds the task-specific directions of every layer and launches them."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from loradash_kernels import Directions, task_specific_directions

from .base_layers import has_plain_code
from .batches import batch_elements, is_out_of_memory, no_memory, release
from .cache import SpectralCache
from .distributed import (
    Group,
    check_same_layers,
    cost,
    exchange_directions,
    gather_in_turns,
    gathered,
    is_sharded,
    place,
    process_group,
    reshard,
    share_out,
)
from .experts import ExpertParameter, ExpertView, matrices
from .meeting import Meeting
from .state import AdaptedLayer, dash_layers, dash_state
from .units import Units


@dataclass(frozen=True)
class LayerReport:
    """What pre-launch found for one layer: the route of its SVD, and rate, sigma and index (s,), highest rate first."""

    name: str
    route: str
    rate: Tensor
    sigma: Tensor
    index: Tensor


def prelaunch(
    model: nn.Module,
    progress: bool = True,
    cache: SpectralCache | None = None,
    device: torch.device | str | None = None,
    group: Group = "world",
) -> list[LayerReport]:
    """Chooses every layer's directions by change rate (paper, section 4) and starts the dash phase.

    Layers of one shape, experts of one parameter among them, are decomposed together, with the method `config.svd`, as many as memory holds: where it does not,
    half of them. Nothing is written before all are found: a failure or an interrupt leaves the model in pre-launch. Layers
    whose ΔW is still zero (unused ones) stay plain LoRA, with a warning. Under torch.distributed every process must call
    this: the layers are shared out by cost, and all processes end with the same directions, or all raise; they wait for
    the slowest outside of collectives, so no timeout bounds it. Parameters sharded by FSDP2 are gathered one layer of
    every share at a time; the weights of quantised layers are made plain one at a time.

    Args:
        cache: takes decompositions from there, and keeps those it has to make.
        device: where to decompose, for instance a GPU for a model whose weights are on the CPU; each layer's own by default.
        group: the processes that have the same layers. All by default; "self" for a stage of a pipeline that one process
            computes, a ProcessGroup for one that several do.

    Returns one report a layer. Raises ValueError for a model without adapters, weights that are not finite or not there
    (meta), merged layers, and layers that are launched already; RuntimeError, naming the process, when another one failed;
    torch.OutOfMemoryError, naming the layer, where one alone is too much.
    """
    method = dash_state(model).config.svd
    held = dash_layers(model)
    layers = matrices(held)
    rank, processes = place(group)
    if processes > 1:
        check_same_layers({name: (layer.out_features, layer.in_features) for name, layer in layers.items()}, group)
    reshard(model)
    _check_phase(held)
    units = Units(model)
    adapters = _adapters(held, units)
    idle = [name for name, (a, b) in adapters.items() if not bool(a.any()) or not bool(b.any())]
    if idle:
        warnings.warn(
            f"loradash: no update yet in {len(idle)} layers, they stay plain LoRA: {', '.join(idle[:4])}", stacklevel=2
        )
    names = [name for name, layer in layers.items() if name not in set(idle) and layer.dash_vt.shape[0]]
    finder = _Finder(held, names, adapters, method, cache, device, units)
    shares = share_out(finder.costs(), processes)
    with tqdm(total=len(names), desc="pre-launch", unit="layer", disable=not progress or rank != 0) as bar:
        found = _find(finder, shares, rank, bar, process_group(group))
    shares = [[name for part in share for name in finder.members[part]] for share in shares]
    if processes > 1:
        buffers = {name: (layers[name].dash_u, layers[name].dash_vt) for name in names}
        found = exchange_directions(found, shares, rank, buffers, group)
    _launch(held, found)
    return [LayerReport(n, found[n].routes[0], found[n].rate, found[n].sigma, found[n].index) for n in names]


def _adapters(layers: dict[str, AdaptedLayer], units: Units) -> dict[str, tuple[Tensor, Tensor]]:
    """A and B of every matrix, whole."""
    found = {}
    for name, layer in layers.items():
        with units.whole(layer) as gathers:
            a, b = gathered(layer.lora_a), gathered(layer.lora_b)
            a, b = (a.clone(), b.clone()) if gathers else (a, b)
        for matrix, view in matrices({name: layer}).items():
            found[matrix] = (_slice(a, view), _slice(b, view))
    return found


def _slice(whole: Tensor, view: Any) -> Tensor:
    """A matrix's part of a tensor of what holds it."""
    return whole[view.expert] if isinstance(view, ExpertView) else whole


def _launch(held: dict[str, AdaptedLayer], found: dict[str, Directions]) -> None:
    for name, layer in held.items():
        if isinstance(layer, ExpertParameter):
            views = matrices({name: layer}).items()
            experts = {view.expert: found[matrix] for matrix, view in views if matrix in found}
            if experts:
                layer.launch_experts(experts)
        elif name in found:
            layer.launch(found[name])


def _check_phase(layers: dict[str, AdaptedLayer]) -> None:
    for wrong, text in (
        (lambda layer: layer.merged, "unmerge(model) before prelaunch; merged"),
        (lambda layer: layer.lora_a.is_meta, "prelaunch needs the weights; on meta"),
        (
            lambda layer: bool(layer.launched),
            "launched already, a second prelaunch would lose their trained dash_sigma",
        ),
    ):
        names = [name for name, layer in layers.items() if wrong(layer)]
        if names:
            raise ValueError(f"{text}: {', '.join(names[:4])}")


def _check_plain(name: str, layer: AdaptedLayer) -> None:
    base = layer.base
    if base is not None and not has_plain_code(base):
        raise ValueError(
            f"{name}: {type(base).__name__} computes in a way of its own, and its weight is sharded (DTensor, ZeRO-3), where it "
            "cannot be asked for its products; train it under FSDP2, FSDP1, DDP or ZeRO-2, or leave it out (exclude_modules)"
        )


class _Finder:
    """Decomposes and chooses, a batch of layers at a time.

    Attributes:
        members: what processes share out, and the matrices in each: themselves, and where weights are sharded all of an experts'
            parameter, which is gathered once.
    """

    def __init__(
        self,
        held: dict[str, AdaptedLayer],
        names: Sequence[str],
        adapters: dict[str, tuple[Tensor, Tensor]],
        method: str,
        cache: SpectralCache | None,
        device: torch.device | str | None,
        units: Units,
    ) -> None:
        self.held, self.layers, self.adapters = held, matrices(held), adapters
        self.method, self.cache, self.device, self.units = method, cache, device, units
        wanted = set(names)
        found = {part: [n for n in matrices({part: layer}) if n in wanted] for part, layer in held.items()}
        together = {part: inside for part, inside in found.items() if inside}
        self.devices = {n: held[part].lora_a.device for part, inside in together.items() for n in inside}
        self.members = together if self.is_sharded() else {name: [name] for name in names}
        # Elements of a batch that once was too large for a device, halved.
        self.bounds: dict[torch.device, int] = {}

    def device_of(self, name: str) -> torch.device:
        return torch.device(self.device or self.devices[name])

    def is_sharded(self) -> bool:
        """Are there weights that only all processes together can gather?"""
        return any(is_sharded(layer.weight) or self.units.has(layer) for layer in self.held.values())

    def costs(self) -> dict[str, float]:
        """Of what is shared out."""
        layers = self.layers
        return {
            part: sum(cost(layers[n].out_features, layers[n].in_features) for n in inside)
            for part, inside in self.members.items()
        }

    def whole_weight(self, name: str) -> Tensor:
        """W (N, K) of a layer, or (E, N, K); every process must ask for the same one. ValueError for a sharded layer that has to be
        asked for it and that no unit of FSDP gathers."""
        layer = self.held[name]
        with self.units.computing(layer) as gathers:
            if is_sharded(layer.weight):
                _check_plain(name, layer)
                return layer.oriented(gathered(layer.weight))
            return layer.weight_nk().detach().clone() if gathers else layer.weight_nk()

    def part_of(self, weight: Tensor, name: str) -> Tensor:
        """A matrix (N, K) of what `whole_weight` gave."""
        return _slice(weight, self.layers[name])

    def batches(self, names: Sequence[str]) -> Iterator[list[str]]:
        """Layers of one shape, rank and device together, in batches of bounded size; with a cache one at a time.

        A bound that is found while a batch is decomposed holds for those after it.
        """
        groups: dict[tuple, list[str]] = {}
        for name in names:
            layer = self.layers[name]
            key = (
                layer.dash_u.shape,
                layer.dash_vt.shape,
                self.adapters[name][0].shape,
                layer.scaling,
                self.devices[name],
            )
            groups.setdefault(key, []).append(name)
        for members in groups.values():
            start = 0
            while start < len(members):
                size = 1 if self.cache else self._most(members[0])
                yield members[start : start + size]
                start += size

    def _most(self, name: str) -> int:
        """How many layers like this one make a batch."""
        device, elements = self.device_of(name), max(1, self._elements(name))
        bound = self.bounds.get(device)
        most = batch_elements(device)
        return max(1, (most if bound is None else min(most, bound)) // elements)

    def _elements(self, name: str) -> int:
        return self.layers[name].out_features * self.layers[name].in_features

    def find(
        self, names: Sequence[str], weight_of: Callable[[str], Tensor], released: bool = False
    ) -> dict[str, Directions]:
        """Directions of the layers of a batch; weight_of gives a whole weight (N, K), asked for one layer at a time.

        Where memory does not hold the batch, each half is tried, down to one layer, which is given up only after unused
        blocks were `released`. Errors about values name the layers.
        """
        try:
            return self._decompose(names, weight_of)
        except ValueError as error:
            raise ValueError(f"{', '.join(names[:4])}{', ...' if len(names) > 4 else ''}: {error}") from error
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            device, layer = self.device_of(names[0]), self.layers[names[0]]
            if len(names) == 1 and released:
                raise no_memory(names[0], layer.out_features, layer.in_features, device) from error
        # What follows comes after the handler, whose traceback holds what the attempt had allocated.
        release(device)
        if len(names) == 1:
            return self.find(names, weight_of, released=True)
        half = len(names) // 2
        self.bounds[device] = half * self._elements(names[0])
        return {**self.find(names[:half], weight_of), **self.find(names[half:], weight_of)}

    @torch.no_grad()
    def _decompose(self, names: Sequence[str], weight_of: Callable[[str], Tensor]) -> dict[str, Directions]:
        layer = self.layers[names[0]]
        device, s, scaling = self.device_of(names[0]), layer.dash_vt.shape[0], layer.scaling
        if self.cache is not None:
            a, b = (t.to(device).float() for t in self.adapters[names[0]])
            weight = weight_of(names[0]).to(device)
            return {names[0]: self.cache.directions(weight, a, b, s, scaling, self.method)}
        size = len(names), layer.out_features, layer.in_features
        # Not in the default dtype, which may be of 16 bits.
        weight = torch.empty(size, dtype=torch.float32, device=device)
        for matrix, name in zip(weight, names, strict=True):
            matrix.copy_(weight_of(name))
        lora_a, lora_b = (torch.stack([self.adapters[name][i].to(device).float() for name in names]) for i in (0, 1))
        many = task_specific_directions(weight, lora_a, lora_b, s, scaling=scaling, method=self.method)
        return {
            name: Directions(*(t[i] for t in many[:5]), many.routes[i : i + 1])  # type: ignore[arg-type, call-arg]
            for i, name in enumerate(names)
        }


def _find(
    finder: _Finder, shares: list[list[str]], rank: int, bar: tqdm, group: torch.distributed.ProcessGroup | None
) -> dict[str, Directions]:
    """This process's share. An error is raised in all processes."""
    found: dict[str, Directions] = {}
    error: BaseException | None = None

    meeting = Meeting(rank, len(shares), "pre-launch", bar, group)

    def take(names: list[str], weight_of: Callable[[str], Tensor]) -> None:
        found.update(finder.find(names, weight_of))
        meeting.advance(len(names))

    def take_part(part: str, weight: Tensor) -> None:
        for batch in finder.batches(finder.members[part]):
            take(batch, functools.partial(finder.part_of, weight))

    # Ctrl-C too is told to the other processes.
    try:
        if finder.is_sharded():
            gather_in_turns(shares, rank, finder.whole_weight, take_part, meeting)
        else:
            for batch in finder.batches(shares[rank]):
                if meeting.is_lost():
                    break
                take(batch, lambda name: finder.layers[name].weight_nk())
    except BaseException as caught:
        error = caught
    meeting.meet(error)
    return found
