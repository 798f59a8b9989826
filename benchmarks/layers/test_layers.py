"""pytest-benchmark suite: every variant, grouped by dtype, shape and pass.

python -m pytest benchmarks --benchmark-enable --benchmark-group-by=group [--device cuda]
"""

from __future__ import annotations

import pytest
import torch

from benchmarks.layers.variants import DTYPES, VARIANTS, build, flops


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("which", ["forward", "backward", "both"])
def test_layer(benchmark, which, dtype, shape, name, device):
    case = build(shape, DTYPES[dtype], [name], device=device)[name]
    benchmark.group = f"{dtype} {'x'.join(map(str, shape))} {which}"
    benchmark.extra_info.update(flops=flops(*shape), saved_bytes=case.saved_bytes())
    call, setup = {
        "forward": (case.forward, None),
        "backward": (case.backward, case.keep_forward),
        "both": (case.step, None),
    }[which]
    benchmark.pedantic(call, setup=setup, rounds=10, warmup_rounds=2)
    assert torch.isfinite(case.forward()).all()
