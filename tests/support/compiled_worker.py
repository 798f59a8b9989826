"""One of several gloo processes that train a compiled Llama: main(RANK, STORE, FOLDER)

Every scheme is trained compiled and, before the processes meet, by one plain process on the whole batch. Rank 0 writes
FOLDER/result.json: for every scheme the losses of both, and of the adapted (under DDP also the plain) model graphs, breaks and
recompilations before launch and at the end, and graphs that AOTAutograd took, which DDPOptimizer's splitting makes more.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch._dynamo import utils
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from benchmarks.compiled.counts import LAUNCH, adapted, compiler_counts, fresh_compiler, schedule_of
from benchmarks.compiled.models import SHALLOW, batch

STEPS = LAUNCH + 2
PROCESSES, ROWS, TOKENS = 2, 2, 8


def _ddp(model: nn.Module) -> Any:
    # Buckets so small that the compiler's DDPOptimizer splits the model at them.
    dist._DEFAULT_FIRST_BUCKET_BYTES = 1
    return torch.compile(DistributedDataParallel(model, bucket_cap_mb=0.002), backend="aot_eager")


def _blocks(model: Any) -> nn.ModuleList:
    return model.model.layers


def _fsdp_blocks(model: nn.Module) -> Any:
    for block in _blocks(model):
        block.compile(backend="aot_eager", fullgraph=True)
        fully_shard(block)
    fully_shard(model)
    return model


def _fsdp_whole(model: nn.Module) -> Any:
    for block in _blocks(model):
        fully_shard(block)
    fully_shard(model)
    return torch.compile(model, backend="aot_eager")


def _plain() -> nn.Module:
    """Without adapters; frozen embeddings, as adapters leave them, so that the first block's input needs no gradient."""
    model: Any = SHALLOW["Llama"].model()
    model.get_input_embeddings().requires_grad_(False)
    return model


SCHEMES: dict[str, Callable[[nn.Module], Any]] = {
    "DDP": _ddp,
    "FSDP2, compiled blocks": _fsdp_blocks,
    "FSDP2, compiled whole": _fsdp_whole,
}

# To compile everything twice takes twice as long.
WITH_PLAIN = "DDP"


def losses(model: nn.Module, call: Any, part: slice, phases: list[Any] | None = None) -> list[float]:
    """Trains on a part of the rows of every step's batch. phases: takes the compiler's counts after launch and at the end."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    schedule, found = schedule_of(model), []
    for step in range(STEPS):
        rows = {name: ids[part] for name, ids in batch(PROCESSES * ROWS, TOKENS, step).items()}
        loss = call(**rows).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if schedule is not None:
            schedule.step()
        found.append(loss.item())
        if phases is not None and step in (LAUNCH - 1, STEPS - 1):
            phases.append(compiler_counts())
    return found


def warm_up() -> None:
    """Imports what the compiler and transformers need."""
    torch.compile(torch.sin, backend="aot_eager")(torch.ones(1))
    adapted(SHALLOW["Llama"])


def main(rank: int, store: str, folder: str) -> None:
    whole = SHALLOW["Llama"]
    alone = adapted(whole)
    expected = losses(alone, alone, slice(None))
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=PROCESSES)
    result: dict[str, Any] = {}
    for name, wrap in SCHEMES.items():
        found, counts = [], {}
        for kind, make in (("plain", _plain), ("adapted", lambda: adapted(whole))):
            if kind == "plain" and name != WITH_PLAIN:
                continue
            with fresh_compiler():
                model, phases = make(), []
                found = losses(model, wrap(model), slice(rank * ROWS, (rank + 1) * ROWS), phases)
                counts[kind] = {"before": phases[0], "end": phases[1], "compiled": utils.counters["aot_autograd"]["ok"]}
        mean = torch.tensor(found)
        dist.all_reduce(mean)
        result[name] = {"losses": (mean / PROCESSES).tolist(), "expected": expected, **counts}
    if rank == 0:
        (Path(folder) / "result.json").write_text(json.dumps(result))
    dist.barrier()
