"""The end of the pre-launch phase: finds the task-specific directions of every layer and launches them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from loradash_kernels import Directions, task_specific_directions

from .base_layers import is_sharded, whole
from .cache import SpectralCache
from .linear import DashLinear
from .model import dash_layers, dash_state, reshard

BATCH_ELEMENTS = 2**26
"""Weights decomposed at a time on the CPU: 256 MB in float32."""
_COPIES = 8  # of a batch that a decomposition on a GPU may need at once, in float32


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
) -> list[LayerReport]:
    """Chooses every layer's directions by change rate (paper, section 4) and starts the dash phase.

    Layers of one shape are decomposed together, with the method `config.svd`. Nothing is written before all are found: a
    failure or an interrupt leaves the model in pre-launch. Layers whose ΔW is still zero (unused ones) stay plain LoRA,
    with a warning. Under torch.distributed every process must call this; the layers are shared out by cost, parameters
    sharded by FSDP2 are gathered a few layers at a time, quantised ones made plain one at a time, and all processes end with the same directions, or all raise.

    Args:
        cache: takes decompositions from there, and keeps those it has to make.
        device: where to decompose; that of each layer by default. A GPU for a model whose weights are on the CPU.

    Returns one report a layer. Raises ValueError for a model without adapters, weights that are not finite or not there
    (meta), merged layers, and layers that are launched already; RuntimeError, naming the process, when another one failed.
    """
    method = dash_state(model).config.svd
    layers = dash_layers(model)
    reshard(model)
    _check_phase(layers)
    adapters = {name: (whole(layer.lora_a), whole(layer.lora_b)) for name, layer in layers.items()}
    idle = [name for name, (a, b) in adapters.items() if not bool(a.any()) or not bool(b.any())]
    if idle:
        warnings.warn(
            f"loradash: no update yet in {len(idle)} layers, they stay plain LoRA: {', '.join(idle[:4])}", stacklevel=2
        )
    names = [name for name, layer in layers.items() if name not in set(idle) and layer.dash_sigma.numel()]
    finder = _Finder(layers, adapters, method, cache, device)
    rank, world = _place()
    shares = share_out({name: _cost(layers[name]) for name in names}, world)
    with tqdm(total=len(shares[rank]), desc="pre-launch", unit="layer", disable=not progress or rank != 0) as bar:
        found = _find(finder, shares, rank, bar)
    found = _exchange(found, shares, layers) if world > 1 else found
    for name in names:
        layers[name].launch(found[name])
    return [LayerReport(n, found[n].routes[0], found[n].rate, found[n].sigma, found[n].index) for n in names]


def _check_phase(layers: dict[str, DashLinear]) -> None:
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


class _Finder:
    """Decomposes and chooses, a batch of layers at a time."""

    def __init__(
        self,
        layers: dict[str, DashLinear],
        adapters: dict[str, tuple[Tensor, Tensor]],
        method: str,
        cache: SpectralCache | None,
        device: torch.device | str | None,
    ) -> None:
        self.layers, self.adapters, self.method, self.cache, self.device = layers, adapters, method, cache, device

    def batches(self, names: Sequence[str]) -> list[list[str]]:
        """Layers of one shape, rank and device together, in batches of bounded size; singly from a cache."""
        groups: dict[tuple, list[str]] = {}
        for name in names:
            layer = self.layers[name]
            key = (layer.dash_u.shape, layer.dash_vt.shape, layer.lora_a.shape, layer.scaling, layer.lora_a.device)
            groups.setdefault(key, []).append(name)
        batches = []
        for members in groups.values():
            layer = self.layers[members[0]]
            elements = layer.out_features * layer.in_features
            size = 1 if self.cache else max(1, batch_elements(self.device or layer.lora_a.device) // max(1, elements))
            batches += [members[i : i + size] for i in range(0, len(members), size)]
        return batches

    def named(self, names: Sequence[str], weight_of: Callable[[str], Tensor]) -> dict[str, Directions]:
        """`find`, whose errors about values name the layers."""
        try:
            return self.find(names, weight_of)
        except ValueError as error:
            raise ValueError(f"{', '.join(names[:4])}{', ...' if len(names) > 4 else ''}: {error}") from error

    @torch.no_grad()
    def find(self, names: Sequence[str], weight_of: Callable[[str], Tensor]) -> dict[str, Directions]:
        """Directions of the layers of a batch; weight_of gives a whole weight (N, K), asked for one layer at a time."""
        layer = self.layers[names[0]]
        device, s, scaling = torch.device(self.device or layer.lora_a.device), layer.dash_sigma.numel(), layer.scaling
        if self.cache is not None:
            a, b = (t.to(device).float() for t in self.adapters[names[0]])
            weight = weight_of(names[0]).to(device)
            return {names[0]: self.cache.directions(weight, a, b, s, scaling, self.method)}
        weight = torch.empty(len(names), layer.out_features, layer.in_features, device=device)
        for matrix, name in zip(weight, names, strict=True):
            matrix.copy_(weight_of(name))
        lora_a, lora_b = (torch.stack([self.adapters[name][i].to(device).float() for name in names]) for i in (0, 1))
        many = task_specific_directions(weight, lora_a, lora_b, s, scaling=scaling, method=self.method)
        return {
            name: Directions(*(t[i] for t in many[:5]), many.routes[i : i + 1])  # type: ignore[arg-type, call-arg]
            for i, name in enumerate(names)
        }


def batch_elements(device: torch.device | str) -> int:
    """Weights to decompose at a time: what the GPU's free memory holds, or a fixed number on the CPU."""
    device = torch.device(device)
    if device.type != "cuda":
        return BATCH_ELEMENTS
    free, _ = torch.cuda.mem_get_info(device)
    return max(1, free // (4 * _COPIES))


def share_out(costs: dict[str, float], parts: int) -> list[list[str]]:
    """Names in `parts` shares of nearly equal cost: the dearest first, each to the share that has least."""
    shares: list[list[str]] = [[] for _ in range(parts)]
    totals = [0.0] * parts
    for name in sorted(costs, key=lambda n: -costs[n]):
        least = totals.index(min(totals))
        shares[least].append(name)
        totals[least] += costs[name]
    return shares


def _cost(layer: DashLinear) -> float:
    n, k = layer.out_features, layer.in_features
    return float(n * k * min(n, k))


def _find(finder: _Finder, shares: list[list[str]], rank: int, bar: tqdm) -> dict[str, Directions]:
    """This process's share. Errors are told to the others before they are raised: nobody waits for the dead."""
    found: dict[str, Directions] = {}
    error: BaseException | None = None
    sharded = any(layer.base is None and is_sharded(layer.weight) for layer in finder.layers.values())
    try:
        if sharded:
            _find_sharded(finder, shares, rank, found, bar)
        else:
            for batch in finder.batches(shares[rank]):
                found |= finder.named(batch, lambda name: finder.layers[name].weight_nk())
                bar.update(len(batch))
    except BaseException as caught:  # Ctrl-C too
        error = caught
    if len(shares) > 1:
        errors: list[str | None] = [None] * len(shares)
        torch.distributed.all_gather_object(errors, error and f"{type(error).__name__}: {error}")
        failed = next((i for i, text in enumerate(errors) if text), None)
        if failed is not None and error is None:
            raise RuntimeError(f"pre-launch failed in process {failed}, the model is unchanged: {errors[failed]}")
    if error is not None:
        raise error
    return found


def _find_sharded(finder: _Finder, shares: list[list[str]], rank: int, found: dict[str, Directions], bar: tqdm) -> None:
    """One layer of every share at a time: gathering is everybody's, decomposing then each one's own."""
    error: BaseException | None = None
    for turn in range(max(len(share) for share in shares)):
        mine: Tensor | None = None
        for owner, share in enumerate(shares):
            if turn < len(share):
                layer = finder.layers[share[turn]]
                gathered = layer.oriented(whole(layer.weight))
                mine = gathered if owner == rank else mine
                del gathered
        if mine is not None and error is None:
            try:
                found |= finder.named([shares[rank][turn]], lambda _, weight=mine: weight)  # type: ignore[misc]
            except BaseException as caught:  # the others still gather with us
                error = caught
            bar.update(1)
    if error is not None:
        raise error


def _place() -> tuple[int, int]:
    dist = torch.distributed
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def _exchange(
    found: dict[str, Directions], shares: list[list[str]], layers: dict[str, DashLinear]
) -> dict[str, Directions]:
    """Everybody's directions, from whoever found them."""
    rank = torch.distributed.get_rank()
    everything: dict[str, Directions] = {}
    for owner, share in enumerate(shares):
        for name in share:
            layer = layers[name]
            device, (n, s), k = layer.dash_u.device, layer.dash_u.shape, layer.dash_vt.shape[1]
            if owner == rank:
                mine = found[name]
                tensors = [t.to(device).contiguous() for t in (mine.u, mine.vt, mine.sigma, mine.rate, mine.index)]
                tensors = [t if t.dtype == torch.int64 else t.float() for t in tensors]
            else:
                tensors = [torch.empty(shape, device=device) for shape in ((n, s), (s, k), (s,), (s,))]
                tensors.append(torch.empty(s, dtype=torch.int64, device=device))
            for tensor in tensors:
                torch.distributed.broadcast(tensor, src=owner)
            routes = [found[name].routes if owner == rank else None]
            torch.distributed.broadcast_object_list(routes, src=owner)
            everything[name] = Directions(*tensors, routes[0])  # type: ignore[arg-type, call-arg]
    return everything
