"""What is measured on a device, the most telling first: a run that is cut is still a result."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from benchmarks.layers.variants import DROPOUT, RANK

# (K, N) of the linear layers of LLaMA 7B, 8B and 70B.
LINEARS = (
    (4096, 4096),
    (4096, 11008),
    (11008, 4096),
    (4096, 14336),
    (14336, 4096),
    (4096, 1024),
    (8192, 8192),
    (8192, 28672),
    (28672, 8192),
)
# The head of 8B: taken once, as few adapt it.
HEAD = (4096, 128256)
ROWS = (4096, 8192, 1024, 2048, 16384)
# In which the other dtypes and the higher rank are measured.
PAIR = ((4096, 4096), (4096, 11008))


@dataclass(frozen=True)
class Workload:
    """One layer at one number of rows. dtype: bf16, fp16, fp32, or tf32 for fp32 products of TF32 operands."""

    dtype: str
    m: int
    k: int
    n: int
    rank: int = RANK
    dropout: float = DROPOUT

    def __str__(self) -> str:
        return f"{self.dtype}/{self.m}x{self.k}x{self.n}/r{self.rank}/p{self.dropout:g}"

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.m, self.k, self.n


@dataclass(frozen=True)
class Job:
    """Some rows that are measured together. kind: "roofs", "layer" (every variant), "strategy" (our own ones),
    "training" or "prelaunch"."""

    kind: str
    workload: Workload | None = None
    shape: tuple[int, int] | None = None

    def __str__(self) -> str:
        return "/".join(str(part) for part in (self.kind, self.workload, self.shape) if part is not None)


def _layers(shapes: Iterable[tuple[int, int]], rows: Iterable[int], **options: float) -> Iterator[Job]:
    for m, (k, n) in itertools.product(rows, shapes):
        yield Job("layer", Workload("bf16", m, k, n, **options))  # type: ignore[arg-type]


def _both(workload: Workload) -> tuple[Job, Job]:
    return Job("layer", workload), Job("strategy", workload)


def all_jobs() -> list[Job]:
    """Every job once, in order of what it tells."""
    square = [Workload("bf16", m, 4096, 4096) for m in (4096, 8192)]
    # A number for each verdict.
    first = [
        Job("roofs"),
        *(Job("layer", workload) for workload in square),
        Job("training"),
        Job("strategy", square[0]),
    ]
    llama = list(_layers(LINEARS, ROWS[:1]))
    sweeps = [Job("strategy", Workload("bf16", 4096, k, n)) for k, n in LINEARS]
    prelaunch = [Job("prelaunch", shape=shape) for shape in ((4096, 4096), (4096, 11008))]
    others = [Workload(dtype, 4096, k, n) for dtype in ("fp16", "fp32", "tf32") for k, n in PAIR]
    others += [Workload("bf16", 4096, k, n, rank=64) for k, n in PAIR]
    rest = [
        *llama,
        Job("strategy", square[1]),
        *_layers(PAIR, ROWS[:1], dropout=0.0),
        *prelaunch,
        *sweeps,
        *_layers(LINEARS, ROWS[1:2]),
        *itertools.chain(*map(_both, others)),
        *_layers(LINEARS, ROWS[2:]),
        Job("layer", Workload("bf16", 4096, *HEAD)),
        *_layers(LINEARS, ROWS, dropout=0.0),
        *[Job("strategy", Workload("bf16", m, k, n)) for m in ROWS for k, n in LINEARS],
        Job("strategy", Workload("bf16", 4096, *HEAD)),
    ]
    return list(dict.fromkeys([*first, *rest]))


def rehearsal() -> list[Job]:
    """A job of every kind, small enough for a CPU."""
    small = [Workload("bf16", 64, 96, 128), Workload("fp32", 48, 64, 64, rank=4, dropout=0.0)]
    jobs = [Job("roofs"), *itertools.chain(*map(_both, small)), Job("training")]
    return [*jobs, Job("prelaunch", shape=(96, 96))]


def selected(jobs: Iterable[Job], shapes: Iterable[str]) -> list[Job]:
    """Those whose shape is named, "KxN" or "MxKxN"; those without one stay. Raises ValueError for a name that fits none."""
    wanted = set(shapes)
    jobs = list(jobs)
    if not wanted:
        return jobs

    def names(job: Job) -> set[str]:
        if job.workload is not None:
            m, k, n = job.workload.shape
            return {f"{k}x{n}", f"{m}x{k}x{n}"}
        return set() if job.shape is None else {"x".join(map(str, job.shape))}

    known = set().union(*map(names, jobs))
    if wanted - known:
        raise ValueError(f"--shapes: nothing is of {', '.join(sorted(wanted - known))}; KxN or MxKxN of workloads.py")
    return [job for job in jobs if not names(job) or names(job) & wanted]
