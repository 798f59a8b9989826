"""pytest-benchmark suite: every variant, grouped by dtype, shape and pass.

python -m pytest benchmarks --benchmark-enable --benchmark-group-by=group
"""

from __future__ import annotations

import pytest
import torch

from benchmarks.layers.variants import DTYPES, SHAPES, VARIANTS, build, flops


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("which", ["forward", "backward", "both"])
def test_layer(benchmark, which, dtype, shape, name):
    case = build(shape, DTYPES[dtype], [name])[name]
    benchmark.group = f"{dtype} {'x'.join(map(str, shape))} {which}"
    benchmark.extra_info.update(flops=flops(*shape), saved_bytes=case.saved_bytes())
    if which == "backward":
        benchmark.pedantic(
            lambda y: y.backward(case.dy), setup=lambda: ((case.forward(),), {}), rounds=10, warmup_rounds=2
        )
    else:
        benchmark.pedantic(case.forward if which == "forward" else case.step, rounds=10, warmup_rounds=2)
    assert torch.isfinite(case.forward()).all()
