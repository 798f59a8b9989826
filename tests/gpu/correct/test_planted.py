"""Faults that are planted in a backend: the matrix finds each, on the device where it is run."""

from __future__ import annotations

import pytest
import torch
from support.devices import TAKES
from support.faults import FAULTS, plant
from support.matrix import checked

from loradash_kernels.testing import make_case


# Only the backward pass sums over rows.
PLANTED = [(f, p) for f in FAULTS for p in ("forward", "backward") if (f, p) != ("without_the_last_row", "forward")]


@pytest.mark.parametrize(("fault", "pass_"), PLANTED)
def test_faults_are_found(monkeypatch, backend, sizes, device, fault, pass_):
    for dtype in TAKES[backend][:3]:
        case = make_case(*sizes.tiles[-1], 16, 8, dtype, adapter_dtype=torch.float32, dropout_p=0.1, device=device)
        checked(case, backend)
        with monkeypatch.context() as patch:
            plant(patch, backend, pass_, fault)
            with pytest.raises(AssertionError, match="of what is allowed"):
                checked(case, backend)
