"""Which way of computing a product is fastest here: measured once per GPU, dtype and shape, and kept on disk.

Candidates are every tile of the architecture's table, fused; the one-launch forward; and the vendor's library with our
low-rank kernels. Without a measurement the table decides. Measuring is asked for with LORADASH_TUNE=1 (at the first call
of each shape) or with `tune`.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from ..._version import __version__
from ..tuning import Measurements, fastest
from . import tiles
from .plan import plan_backward, plan_forward
from .problem import Problem, Strategy, descriptors_fit
from .target import TileConfig

KINDS = ("fused", "descriptors", "one_launch", "library")
_forced: dict[str, Strategy] = {}


def choose(direction: str, problem: Problem, operands: Sequence[Tensor | None]) -> Strategy | None:
    """The strategy for a call ("forward" or "backward"), or None: the table's. operands: of its large product."""
    if direction in _forced:
        return _forced[direction]
    name = key(direction, problem, operands)
    found = MEASURED.known().get(name)
    if found is None and os.environ.get("LORADASH_TUNE") == "1" and _may_measure(problem):
        try:
            found = tune(direction, problem, operands)
        except (RuntimeError, torch.OutOfMemoryError) as error:  # the call itself may well fit
            MEASURED.warn(f"tuning failed, the table decides for {name}: {error}")
            MEASURED.known()[name] = Strategy()
    return found


@contextlib.contextmanager
def forced(**strategies: Strategy) -> Iterator[None]:
    """Calls within take these strategies: forced(forward=..., backward=...)."""
    before = dict(_forced)
    _forced.update(strategies)
    try:
        yield
    finally:
        _forced.clear()
        _forced.update(before)


def key(direction: str, problem: Problem, operands: Sequence[Tensor | None]) -> str:
    """What a measurement holds for: GPU, versions, dtype, layouts and shape, M rounded up to a power of two."""
    import triton

    device = problem.x.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else problem.target.name
    bucket = 1 << max(problem.m - 1, 0).bit_length()
    layout = "".join("-" if t is None else "n" if t.stride(-1) == 1 else "t" for t in operands)
    layout += "d" if descriptors_fit(problem, *operands) else ""
    return "/".join(
        str(part)
        for part in (
            name, f"triton {triton.__version__}", __version__, direction, problem.x.dtype, bucket, problem.k, problem.n,
            problem.rank, problem.directions, "dropout" if problem.dropout else "plain", problem.precision, layout,
        )
    )  # fmt: skip


def candidates(direction: str, problem: Problem, operands: Sequence[Tensor | None]) -> list[Strategy]:
    """Every strategy that could be fastest."""
    depth = problem.k if direction == "forward" else problem.n
    table = tiles.gemm_table(problem.target, problem.itemsize, depth, problem.r_block)
    found = [Strategy("fused", tile) for tile in table]
    if problem.weight is None:
        return found
    if descriptors_fit(problem, *operands):
        found += [Strategy("descriptors", tile) for tile in table]
    one_launch = problem.target.warp_size == 32 and problem.width > 0 and problem.r_block <= tiles.ONE_LAUNCH_WIDTH
    if direction == "forward" and one_launch:
        found += [Strategy("one_launch", t) for t in tiles.one_launch_table(problem.target, problem.itemsize)]
    return [*found, Strategy("library")]


def tune(
    direction: str,
    problem: Problem,
    operands: Sequence[Tensor | None],
    timer: Callable[[Callable[[], None]], float] | None = None,
) -> Strategy:
    """Times every candidate on the problem's tensors, keeps the fastest and writes the cache.

    timer: seconds (or any unit) of a callable; Triton's do_bench unless given. A candidate that does not fit the GPU
    is left out. Raises RuntimeError where none runs.
    """
    if timer is None:
        from triton.testing import do_bench

        timer = do_bench
    best = fastest(candidates(direction, problem, operands), lambda s: _runner(direction, problem, s), timer)
    MEASURED.remember(key(direction, problem, operands), best)
    return best


def _runner(direction: str, q: Problem, strategy: Strategy) -> Callable[[], None]:
    """Runs one whole call into buffers of its own."""
    f32 = torch.float32
    p = q.x.new_zeros(q.m, q.width, dtype=f32)
    y = q.x.new_zeros(q.m, q.n)
    dx = q.x.new_empty(q.m, q.k)
    da, db_lora, dsigma = (q.x.new_empty(s, dtype=f32) for s in ((q.rank, q.k), (q.n, q.rank), (q.directions,)))

    def forward() -> None:
        base = None if q.weight is not None else y
        for launch in plan_forward(q, None, base, y, p, strategy):
            launch.run()

    def backward() -> None:
        for launch in plan_backward(q, y, p, dx, da, db_lora, dsigma, None, strategy):
            launch.run()

    return forward if direction == "forward" else backward


def _may_measure(problem: Problem) -> bool:
    return problem.x.device.type == "cuda" and problem.m > 0 and not torch.cuda.is_current_stream_capturing()


def _from_json(entry: dict[str, Any]) -> Strategy:
    if entry["kind"] not in KINDS:
        raise ValueError(f"unknown kind {entry['kind']!r}")
    return Strategy(entry["kind"], None if entry["tile"] is None else TileConfig(**entry["tile"]))


MEASURED: Measurements[Strategy] = Measurements("triton-tiles-1.json", asdict, _from_json)
