"""What tests of the Triton backend share; imported without Triton too."""

from __future__ import annotations

from types import SimpleNamespace

import pytest


@pytest.fixture
def launched(monkeypatch):
    """Launches by Triton, and launches past it, of plans that are run; nothing is executed."""
    from support.plans import Compiled

    from loradash_kernels.backends.triton import backend, launcher, prepared
    from loradash_kernels.backends.triton.problem import KernelLaunch, LibraryProduct

    seen = SimpleNamespace(by_triton=[], repeated=[], products=[])

    def run(launch):
        seen.by_triton.append(launch)
        return Compiled(launch.kernel.__name__, seen.repeated)

    monkeypatch.setattr(KernelLaunch, "run", run)
    monkeypatch.setattr(LibraryProduct, "run", lambda product: seen.by_triton.append(product))
    monkeypatch.setattr(prepared, "multiply", lambda *operands: seen.products.append(operands))
    monkeypatch.setattr(launcher, "current_stream", lambda device: "stream")
    monkeypatch.setattr(backend, "architecture_of", lambda device: "sm_90")
    monkeypatch.setattr(backend, "PLANS", prepared.PlanCache(64))
    return seen
