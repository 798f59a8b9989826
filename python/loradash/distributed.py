"""Parameters sharded over processes (FSDP2, DTensor, ZeRO-3), and one job shared out among processes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from loradash_kernels import Directions
from loradash_kernels.sharded import compare_seeds, groups_of

from . import zero
from .meeting import Meeting, global_rank


def is_dtensor(t: Tensor) -> bool:
    """Is a tensor one of torch.distributed's (DTensor)?"""
    return hasattr(t, "device_mesh")


def is_sharded(t: Tensor) -> bool:
    """Does this process hold a part of a tensor only: of a DTensor, or of a parameter of ZeRO-3?"""
    return is_dtensor(t) or zero.is_partitioned(t)


def gathered(t: Tensor) -> Tensor:
    """A detached tensor, whole: a sharded one is gathered, for which every process must call this."""
    if zero.is_partitioned(t):
        return zero.gather(t)
    return t.full_tensor().detach() if is_dtensor(t) else t.detach()  # type: ignore[attr-defined]


def shard_of(values: Tensor, like: Tensor, source: int | None = None) -> Tensor:
    """A whole tensor as `like` holds it: each process takes its own part, or that of process `source`'s values."""
    if not is_dtensor(like) or is_dtensor(values):
        return values
    from torch.distributed.tensor import distribute_tensor

    sharded: Any = like
    return distribute_tensor(values.to(like.device), sharded.device_mesh, sharded.placements, src_data_rank=source)


@torch.no_grad()
def assign(t: Tensor, values: Tensor, source: int | None = None) -> None:
    """Writes whole values into a tensor in place, and into what an optimizer keeps of it.

    Every process must call this for a sharded one; each writes its own part, or that of process `source`'s values.
    """
    if zero.is_partitioned(t):
        zero.write(t, values)
    else:
        t.copy_(shard_of(values, t, source))
    zero.renew_copy(t)


def reshard(model: nn.Module) -> None:
    """Sends parameters that FSDP2 left gathered after a forward pass back to their shards, which are the ones that last.

    What comes next takes all processes. Those of a tensor-parallel group make sure that they have drawn the same dropout
    masks: RuntimeError, in all of them, where they have not.
    """
    for module in model.modules():
        if hasattr(module, "reshard") and hasattr(module, "unshard"):
            module.reshard()  # type: ignore[operator]
    compare_seeds({name for p in model.parameters() if is_dtensor(p) for name in groups_of(p)})


Group: TypeAlias = 'Literal["world", "self"] | torch.distributed.ProcessGroup'
"""The processes that have the same layers: all, this one alone, or those of a group."""


def place(group: Group = "world") -> tuple[int, int]:
    """(rank, number of processes) in a group; (0, 1) without torch.distributed."""
    dist = torch.distributed
    if group != "self" and dist.is_available() and dist.is_initialized():
        return dist.get_rank(process_group(group)), dist.get_world_size(process_group(group))
    return 0, 1


def process_group(group: Group) -> torch.distributed.ProcessGroup | None:
    """As torch.distributed's functions want it."""
    return None if isinstance(group, str) else group


def check_same_layers(shapes: Mapping[str, tuple[int, int]], group: Group) -> None:
    """ValueError where the processes of a group have not all layers of the same names and shapes."""
    processes = place(group)[1]
    found: list[Any] = [None] * processes
    torch.distributed.all_gather_object(found, dict(shapes), group=process_group(group))
    for process, theirs in enumerate(found):
        other = sorted(theirs.items() ^ found[0].items())
        if other:
            raise ValueError(
                f"processes 0 and {process} have different adapted layers ({other[0][0]}), and launch shares the work of "
                'same ones: give the processes that have them, DashSchedule(stage, group="self") for a stage of a pipeline '
                "that one process computes, else group=their ProcessGroup"
            )


def cost(n: int, k: int) -> float:
    """What decomposing a matrix N x K costs, beside others."""
    return float(n * k * min(n, k))


def share_out(costs: Mapping[str, float], parts: int) -> list[list[str]]:
    """Names in `parts` shares of nearly equal cost: the dearest first, each to the share that has least."""
    shares: list[list[str]] = [[] for _ in range(parts)]
    totals = [0.0] * parts
    for name in sorted(costs, key=lambda n: -costs[n]):
        least = totals.index(min(totals))
        shares[least].append(name)
        totals[least] += costs[name]
    return shares


def gather_in_turns(
    shares: list[list[str]],
    rank: int,
    gather: Callable[[str], Tensor],
    use: Callable[[str, Tensor], None],
    meeting: Meeting,
) -> None:
    """Calls use(name, whole tensor) for this process's share.

    Gathering takes all processes, so they go through the shares together: a turn gathers one tensor of every share, each
    process keeps its own and uses it while no other tensor is held, and then they meet. Where `use` fails in one, all
    raise after that turn.
    """
    for turn in range(max(map(len, shares))):
        mine: Tensor | None = None
        for owner, share in enumerate(shares):
            if turn < len(share):
                tensor = gather(share[turn])
                mine = tensor if owner == rank else mine
                del tensor
        error: BaseException | None = None
        try:
            if mine is not None:
                use(shares[rank][turn], mine)
        except BaseException as caught:
            error = caught
        meeting.meet(error)


def exchange_directions(
    found: Mapping[str, Directions],
    shares: list[list[str]],
    rank: int,
    buffers: Mapping[str, tuple[Tensor, Tensor]],
    group: Group = "world",
) -> dict[str, Directions]:
    """The directions of all shares, each sent by the process that found them.

    Args:
        found: this process's.
        buffers: u (N, s) and vt (s, K) of every layer, for shapes and device.
    """
    everything: dict[str, Directions] = {}
    members = process_group(group)
    for owner, share in enumerate(shares):
        for name in share:
            u, vt = buffers[name]
            if owner == rank:
                ours = found[name]
                tensors = [t.to(u.device, torch.float32).contiguous() for t in (ours.u, ours.vt, ours.sigma, ours.rate)]
                tensors.append(ours.index.to(u.device).contiguous())
                routes = [ours.routes]
            else:
                shapes = (u.shape, vt.shape, vt.shape[:1], vt.shape[:1])
                tensors = [torch.empty(shape, device=u.device) for shape in shapes]
                tensors.append(torch.empty(vt.shape[0], dtype=torch.int64, device=u.device))
                routes = [()]
            for tensor in tensors:
                torch.distributed.broadcast(tensor, src=global_rank(members, owner), group=members)
            torch.distributed.broadcast_object_list(routes, src=global_rank(members, owner), group=members)
            everything[name] = Directions(*tensors, routes[0])  # type: ignore[arg-type, call-arg]
    return everything
