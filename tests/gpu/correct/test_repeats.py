"""The same bits again and again, while other streams keep the device busy. The rehearsal has no other streams."""

from __future__ import annotations

import torch
from support.load import Load
from support.matrix import Way, poisoned
from support.promises import own_sums

from loradash_kernels.backends import tuning
from loradash_kernels.testing import check_error_rule, make_case, run


def test_repeats_give_the_same_bits(way: Way, sizes, device):
    """Every result that our own kernels sum; whatever a library sums keeps the error rule, the first and the last time."""
    case = make_case(*sizes.tiles[0], 16, 8, way.dtype, adapter_dtype=torch.float32, dropout_p=0.1, device=device)
    load, results = Load(device), []
    names = own_sums(way.backend, case, way.is_fused)
    with tuning.forced(way.backend, **(way.forced(case) or {})):
        for repeat in range(sizes.repeats):
            load.add()
            if repeat % 10 == 0:
                with poisoned(device):
                    results.append(run(case, way.backend))
            else:
                results.append(run(case, way.backend))
    for found in results[1:]:
        differ = [name for name in names if not torch.equal(found[name], results[0][name])]
        assert not differ, f"{differ} differ from run to run"
    check_error_rule(case, results[0])
    check_error_rule(case, results[-1])
