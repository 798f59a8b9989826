"""Arguments that are DTensors: what each process computes of a layer, and what is summed over processes.

Along every dimension of the mesh a layer is divided in one of four ways, which the placements of its arguments tell:

| way | sharded | whole | y | summed in backward |
|---|---|---|---|---|
| column | W, b, B, U and y along N | x, A, Vᵀ, Δσ | sharded along N | dx, and dA, dΔσ |
| row | x, W, A, Vᵀ along K | b, B, U, Δσ | partial sums | dB, dΔσ |
| batch | x and y along one of their leading dimensions | all others | sharded likewise | dA, dB, dΔσ, db |
| whole | nothing | all | whole | nothing |

Row: y is linear in P = x̃ Dᵀ, so each process takes its own part of P through the fused operator, and the sum of y that the
frozen layer needs anyway is the only one in forward. Summing P beforehand would be one more sum in forward, of M · R numbers;
this way it is one in backward, of N · r + s, whatever M is. One sum a layer and mesh dimension serves all its small gradients.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import ops
from .autograd import TWICE
from .random import draw_seed, window

LAST = "last"
SUM = "partial sums"


class Way(NamedTuple):
    """How one dimension of a mesh divides a layer: the tensor dimension by which an argument is sharded (`LAST` for its
    last), `SUM` for partial sums; arguments that are not named are whole. summed: whose gradients are partial sums."""

    name: str
    places: dict[str, int | str]
    out: int | str | None
    summed: tuple[str, ...] = ()


COLUMN = Way(
    "column",
    {"weight": 0, "bias": 0, "lora_b": 0, "dash_u": 0, "y": LAST},
    LAST,
    ("lora_a", "dash_sigma"),
)
ROW = Way(
    "row",
    {"x": LAST, "weight": 1, "lora_a": 1, "dash_vt": 1, "y": SUM},
    SUM,
    ("lora_b", "dash_sigma"),
)
_WHOLE = Way("whole", {}, None)


def _batch(dim: int) -> Way:
    return Way("batch", {"x": dim, "y": dim}, dim, ("lora_a", "lora_b", "dash_sigma", "bias"))


def is_distributed(t: Any) -> bool:
    """Is it a DTensor?"""
    return hasattr(t, "device_mesh")


def refuse_mixed(tensors: dict[str, Any]) -> None:
    """Raises ValueError where x (or y) is a plain tensor and others are DTensors, of which no rule can tell what is meant."""
    sharded = [name for name, t in tensors.items() if is_distributed(t)]
    plain = [name for name, t in tensors.items() if isinstance(t, Tensor) and not is_distributed(t)]
    if sharded and plain:
        listed = ", ".join(f"{name} is a DTensor" for name in sharded)
        raise ValueError(
            f"{listed}, and {', '.join(plain)} a plain tensor: wanted all as DTensors of one mesh. Give activations by "
            "DTensor.from_local(x, mesh, placements), or parallelize the layer by loradash.tensor_parallel's ColwiseDash or "
            "RowwiseDash, which do it"
        )


def refuse_distributed(what: str, tensors: dict[str, Any]) -> None:
    """Raises ValueError for DTensors among the tensors of something that has no rule for them."""
    sharded = [name for name, t in tensors.items() if is_distributed(t)]
    if sharded:
        raise ValueError(
            f"{', '.join(sharded)} of {what} is a DTensor; wanted plain tensors, which layers divided by parallelize_module do "
            "not have, and those of FSDP2 have"
        )


class Split(NamedTuple):
    """This process's part of a call.

    tensors: local, in the order given. seed: of the mask's part. whole: makes the local result a DTensor.
    """

    tensors: list[Any]
    seed: Tensor | None
    whole: Callable[[Tensor], Tensor]


def split(threshold: int, tensors: dict[str, Any]) -> Split:
    """The local tensors of a call whose x is a DTensor, by name; differentiable.

    Every process of the mesh must call this. A mask is that of the whole x: its seed must be the same in all of them, for
    which their generators must agree (`agreed`).

    Raises ValueError for placements that make up none of the four ways, naming argument and placement; for arguments that are
    not all DTensors of one mesh; and, where dropout wants a mask, for a part of x whose elements are no block of it.
    RuntimeError where the seeds differ.
    """
    refuse_mixed(tensors)
    x = tensors["x"]
    mesh = x.device_mesh
    ways = _ways(tensors, mesh)
    shape = (*x.shape[:-1], tensors["lora_b"].shape[0])
    local: dict[str, Any] = {name: None if t is None else _local(name, t, ways) for name, t in tensors.items()}
    if local.get("bias") is not None:
        local["bias"] = _once(local["bias"], mesh, ways)
    for dim, way in enumerate(ways):
        _sum_gradients(local, way, mesh, dim)
    seed = None
    if threshold:
        row, column = _place(x, mesh, ways)
        seed = agreed(draw_seed(local["x"].device), mesh)
        seed = window(seed, row, column) if row or column else seed
    return Split(list(local.values()), seed, _Whole(mesh, ways, shape))


# What was found for placements of arguments, of which a program has few; finding it takes longer than the layer's kernels.
_FOUND: dict[tuple, list[Way]] = {}


def _ways(tensors: dict[str, Any], mesh: Any) -> list[Way]:
    """The way in which each dimension of the mesh divides these arguments. Raises ValueError where there is none."""
    for name, t in tensors.items():
        if t is not None and t.device_mesh != mesh:
            raise ValueError(f"{name} is on {t.device_mesh}, x on {mesh}; wanted one mesh")
    if torch.compiler.is_compiling():
        return [_way(tensors, mesh, dim) for dim in range(mesh.ndim)]
    key = tuple((name, t.dim(), t.placements) for name, t in tensors.items() if t is not None)
    found = _FOUND.get(key)
    if found is None:
        found = _FOUND[key] = [_way(tensors, mesh, dim) for dim in range(mesh.ndim)]
    return found


def _way(tensors: dict[str, Any], mesh: Any, dim: int) -> Way:
    x = tensors["x"]
    found = _place_of(x, dim)
    if found == x.dim() - 1:
        way = ROW
    elif isinstance(found, int):
        way = _batch(found)
    else:
        way = COLUMN if found is None and _place_of(tensors["lora_b"], dim) == 0 else _WHOLE
    for name, t in tensors.items():
        if t is None:
            continue
        wanted = way.places.get(name)
        wanted = t.dim() - 1 if wanted == LAST else wanted
        if _place_of(t, dim) != wanted:
            axis = mesh.mesh_dim_names[dim] if mesh.mesh_dim_names else dim
            raise ValueError(
                f"{name} is placed {t.placements[dim]} along the mesh's dimension {axis}, wanted {_said(wanted)} where x is "
                f"{x.placements[dim]} and lora_b {tensors['lora_b'].placements[dim]}; ways to divide a layer: column (weight, bias, "
                "lora_b, dash_u Shard(0)), row (x Shard(-1), weight, lora_a, dash_vt Shard(1), y Partial), batch (x Shard(0)); "
                "everything else Replicate"
            )
    return way


def _said(place: int | str | None) -> str:
    return "Replicate" if place is None else "Partial" if place == SUM else f"Shard({place})"


def _place_of(t: Any, dim: int) -> int | str | None:
    """The tensor dimension by which a mesh dimension shards t, None for none, `SUM` for partial sums, else what it is."""
    from torch.distributed.tensor import Partial, Replicate, Shard

    placed = t.placements[dim]
    if isinstance(placed, Replicate):
        return None
    # Asked by comparing, which the compiler does for good; a strided shard, as FSDP2 makes of one, is another order.
    for i in range(t.dim()):
        if type(placed) is Shard and (placed == Shard(i) or placed == Shard(i - t.dim())):
            return i
    if type(placed) is Partial and placed.reduce_op == "sum":
        return SUM
    return repr(placed)


def placement(place: int | str | None, dims: int) -> Any:
    from torch.distributed.tensor import Partial, Replicate, Shard

    if place is None:
        return Replicate()
    return Partial() if place == SUM else Shard(dims - 1 if place == LAST else int(place))


def _local(name: str, t: Any, ways: Sequence[Way]) -> Tensor:
    """This process's part. Gradients of x are left partial, for DTensor to sum where that is wanted; ours are summed."""
    from torch.distributed.tensor import Partial

    if not (t.requires_grad and torch.is_grad_enabled()):
        # Without a gradient there is nothing to note for one.
        with torch.no_grad():
            return t.to_local()
    gradients = list(t.placements)
    for dim, way in enumerate(ways):
        if name == "x" and way is COLUMN:
            gradients[dim] = Partial()
        if name == "y" and way is ROW:
            # Every process has the whole gradient of a sum.
            gradients[dim] = placement(None, t.dim())
    local = t.to_local(grad_placements=gradients)
    if not torch.compiler.is_compiling():
        local.register_hook(_refuse_graph)
    return local


def _refuse_graph(gradient: Tensor) -> None:
    """Gradients that are to be differentiated again: DTensor's own passes would cut their graph here without a word."""
    if torch.is_grad_enabled():
        raise RuntimeError(TWICE)


def _once(bias: Tensor, mesh: Any, ways: Sequence[Way]) -> Tensor | None:
    """The bias in the first of the processes whose results are summed. All of them have its gradient."""
    if all(way is not ROW or mesh.get_local_rank(dim) == 0 for dim, way in enumerate(ways)):
        return bias
    return bias - bias.detach() if bias.requires_grad and torch.is_grad_enabled() else None


def _sum_gradients(local: dict[str, Any], way: Way, mesh: Any, dim: int) -> None:
    names = [name for name in way.summed if local.get(name) is not None and local[name].requires_grad]
    if names and mesh.size(dim) > 1 and torch.is_grad_enabled():
        summed = _SummedGradients.apply(mesh, dim, *(local[name] for name in names))
        local.update(zip(names, summed, strict=True))


class _SummedGradients(torch.autograd.Function):
    """The same tensors, whose gradients are summed over a dimension of the mesh, all in one collective."""

    @staticmethod
    def forward(ctx: Any, mesh: Any, dim: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.mesh, ctx.dim = mesh, dim
        return tuple(t.view_as(t) for t in tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        import torch.distributed._functional_collectives as collectives

        flat = torch.cat([g.reshape(-1) for g in gradients])
        summed = collectives.wait_tensor(collectives.all_reduce(flat, "sum", (ctx.mesh, ctx.dim)))
        parts = summed.split([g.numel() for g in gradients])
        return (None, None, *(p.view(g.shape).to(g.dtype) for p, g in zip(parts, gradients, strict=True)))


class _Whole:
    """Makes a local result the DTensor that it is a part of."""

    def __init__(self, mesh: Any, ways: Sequence[Way], shape: tuple[int, ...]) -> None:
        self.mesh, self.shape = mesh, shape
        self.placements = [placement(way.out, len(shape)) for way in ways]

    def __call__(self, y: Tensor) -> Tensor:
        from torch.distributed.tensor import DTensor

        stride = [math.prod(self.shape[i + 1 :]) for i in range(len(self.shape))]
        return DTensor.from_local(
            y, self.mesh, self.placements, run_check=False, shape=torch.Size(self.shape), stride=tuple(stride)
        )


def _place(x: Any, mesh: Any, ways: Sequence[Way]) -> tuple[int, int]:
    """The first row and column of this process's x in the whole one, its leading dimensions flattened."""
    begin, size, largest = [0] * x.dim(), list(x.shape), list(x.shape)
    for dim, way in enumerate(ways):
        place = way.places.get("x")
        if place is None:
            continue
        place = x.dim() - 1 if place == LAST else int(place)
        chunk = -(-size[place] // mesh.size(dim))
        start = min(mesh.get_local_rank(dim) * chunk, size[place])
        begin[place] += start
        size[place] = min(chunk, size[place] - start)
        largest[place] = -(-largest[place] // mesh.size(dim))
    for entry in getattr(x._spec, "shard_order", ()) if mesh.ndim > 1 else ():
        if any(one > next_ for one, next_ in zip(entry.mesh_dims, entry.mesh_dims[1:], strict=False)):
            raise ValueError(
                f"dropout: x is sharded along dimension {entry.tensor_dim} in the order {entry.mesh_dims} of the mesh's"
            )
    # Told by all processes, whose parts begin at other columns.
    if largest[-1] < x.shape[-1] and largest[-1] % 8:
        raise ValueError(
            f"dropout: x {tuple(x.shape)} is sharded into parts of {largest[-1]} columns; wanted a multiple of 8, the neighbours that "
            "share a draw of the mask"
        )
    for place in range(1, x.dim() - 1):
        if largest[place] < x.shape[place] and math.prod(largest[:place]) > 1:
            raise ValueError(
                f"dropout: x {tuple(x.shape)} is sharded along dimension {place}, so that this process's rows are no block of "
                "all rows, whose mask is drawn; shard dimension 0, or redistribute x before the layer"
            )
    row = sum(begin[i] * math.prod(x.shape[i + 1 : -1]) for i in range(x.dim() - 1))
    return row, begin[-1]


# A seed is kept until so many are compared at once; before, after the first, second, fourth, eighth, ... call.
EVERY = 512


class _Watch:
    """The seeds drawn by the calls on one mesh since they were compared last."""

    def __init__(self) -> None:
        self.calls = 0
        self.waiting: list[Tensor] = []


_WATCHES: dict[tuple[str, ...], _Watch] = {}


def agreed(seed: Tensor, mesh: Any) -> Tensor:
    """The seed, noted to be compared over the mesh: every process must draw the same, or their masks are not parts of one.

    Compared at the first call on a mesh, at the second, the fourth and so on, and from then on at every 512th, all since
    the last time: one small sum, and a wait for it. Raises RuntimeError, in all processes, where seeds differ. Nothing is
    compared while a CUDA graph is captured.
    """
    names = tuple(mesh.get_group(dim).group_name for dim in range(mesh.ndim))
    if torch.compiler.is_compiling():
        return torch.ops.loradash.agreed_seed(seed, list(names))
    _note(seed, names)
    return seed


def _note(seed: Tensor, names: tuple[str, ...]) -> None:
    if seed.is_cuda and torch.cuda.is_current_stream_capturing():
        return
    watch = _WATCHES.setdefault(names, _Watch())
    watch.waiting.append(seed)
    watch.calls += 1
    if len(watch.waiting) >= EVERY or (watch.calls < EVERY and watch.calls & (watch.calls - 1) == 0):
        _compare(names, watch)


def compare_seeds(groups: Collection[str]) -> None:
    """Compares what was noted since the last comparison by calls on meshes of these process groups, given by name. Every process
    of the groups must call this."""
    for names, watch in _WATCHES.items():
        if watch.waiting and set(names) <= set(groups):
            _compare(names, watch)


def groups_of(t: Any) -> set[str]:
    """The names of the process groups that have a DTensor."""
    return {t.device_mesh.get_group(dim).group_name for dim in range(t.device_mesh.ndim)}


def _compare(names: tuple[str, ...], watch: _Watch) -> None:
    from torch.distributed.distributed_c10d import ReduceOp, _resolve_process_group, all_reduce

    seeds = torch.stack(watch.waiting).flatten()
    watch.waiting = []
    # Their number and a sum in which each has a weight of its own, so that processes always send the same few bytes.
    digest = torch.stack((seeds.new_full((), len(seeds)), (seeds * (2 * torch.arange(len(seeds)) + 1).to(seeds)).sum()))
    # The largest, and the smallest as the largest of the negated.
    extremes = torch.cat((digest, -digest))
    for name in names:
        all_reduce(extremes, op=ReduceOp.MAX, group=_resolve_process_group(name))  # type: ignore[arg-type]
    largest, smallest = extremes.chunk(2)
    if not torch.equal(largest, -smallest):
        raise RuntimeError(
            "dropout: the processes that share a layer drew different seeds, and their masks are not parts of one: every process "
            "of the mesh that x is on (of a tensor-parallel group) must call torch.manual_seed with the same number, and draw the "
            f"same numbers from torch's generator since (the one of {seeds.device})"
        )


ops.LIBRARY.define("agreed_seed(Tensor seed, str[] groups) -> Tensor")


def _agreed_seed(seed: Tensor, groups: list[str]) -> Tensor:
    _note(seed.clone(), tuple(groups))
    return seed.clone()


ops.LIBRARY.impl("agreed_seed", _agreed_seed, "CompositeExplicitAutograd")
torch.library.register_fake("loradash::agreed_seed", lambda seed, groups: seed.new_empty(seed.shape), lib=ops.LIBRARY)
