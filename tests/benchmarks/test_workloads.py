"""What is measured on a device, and in which order."""

from __future__ import annotations

import pytest

from benchmarks.layers.workloads import Job, Workload, all_jobs, rehearsal, selected

JOBS = all_jobs()
LAYERS = [job.workload for job in JOBS if job.kind == "layer"]
LLAMA = "4096x4096 4096x11008 11008x4096 4096x1024 4096x14336 14336x4096 8192x8192 8192x28672 28672x8192"


def test_every_job_stands_once():
    assert len(set(map(str, JOBS))) == len(JOBS)


@pytest.mark.parametrize("shape", LLAMA.split())
def test_linears_of_llama_with_and_without_dropout(shape):
    k, n = map(int, shape.split("x"))
    for dropout in (0.0, 0.05):
        rows = {w.m for w in LAYERS if (w.k, w.n, w.dtype, w.rank, w.dropout) == (k, n, "bf16", 16, dropout)}
        assert rows == {1024, 2048, 4096, 8192, 16384}, dropout


def test_the_head_once():
    assert [str(w) for w in LAYERS if w.n == 128256] == ["bf16/4096x4096x128256/r16/p0.05"]


@pytest.mark.parametrize(("dtype", "rank"), [("fp16", 16), ("fp32", 16), ("tf32", 16), ("bf16", 64)])
def test_two_shapes_in_other_dtypes_and_at_a_higher_rank(dtype, rank):
    for kind in ("layer", "strategy"):
        assert sum((j.workload.dtype, j.workload.rank) == (dtype, rank) for j in JOBS if j.kind == kind) == 2


def test_the_most_telling_come_first():
    first = [str(job) for job in JOBS[:5]]
    square = "{}/bf16/{}x4096x4096/r16/p0.05".format
    assert first == ["roofs", square("layer", 4096), square("layer", 8192), "training", square("strategy", 4096)]
    kinds = [job.kind for job in JOBS]
    assert kinds.index("prelaunch") < kinds.index("layer", 14) + 10
    # Every linear at one number of rows comes before the second number of rows of any but the square.
    later = next(
        i for i, job in enumerate(JOBS) if job.kind == "layer" and job.workload.k != 4096 and job.workload.m != 4096
    )
    shapes = {(j.workload.k, j.workload.n) for j in JOBS[:later] if j.kind == "layer"}
    assert len(shapes) == 9


def test_every_strategy_has_its_layer():
    assert {j.workload for j in JOBS if j.kind == "strategy"} <= set(LAYERS)


def test_a_rehearsal_has_every_kind():
    assert {job.kind for job in rehearsal()} == {job.kind for job in JOBS}


def test_selected():
    jobs = [
        Job("roofs"),
        *(Job("layer", Workload("bf16", m, 64, 32)) for m in (8, 16)),
        Job("prelaunch", shape=(64, 32)),
    ]
    assert selected(jobs, []) == jobs
    assert selected(jobs, ["64x32"]) == jobs
    assert selected(jobs, ["16x64x32"]) == [jobs[0], jobs[2]]
    with pytest.raises(ValueError, match="nothing is of 32x64"):
        selected(jobs, ["16x64x32", "32x64"])
