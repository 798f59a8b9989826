"""Finding directions on a GPU that is not the current one, and on devices that are no GPU of CUDA; none is here."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace

import pytest
import torch

from loradash_kernels.directions import choice, kernels, policy, randomized_svd
from loradash_kernels.directions.decompositions import TwoSided


@pytest.fixture
def launched(monkeypatch):
    """Kernels that note the device that is current where they are called."""
    noted, current = [], []

    @contextlib.contextmanager
    def device_of(t):
        current.append(t.shape)
        yield
        current.pop()

    def sketch(w, seed, width):
        noted.append(("sketch", *current))
        return w[..., :width].contiguous()

    def jacobi(x):
        noted.append(("jacobi", *current))
        _, sigma, vt = torch.linalg.svd(x)
        return sigma, vt, torch.ones(len(x), dtype=torch.bool)

    def rates(u, v, sigma, b, at, s, scaling, eps, one_sided):
        noted.append(("rates", *current))
        return sigma[:, :s], torch.zeros(len(sigma), s, dtype=torch.int64)

    found = SimpleNamespace(sketch=sketch, jacobi=jacobi, rates=rates, takes=lambda n, rank: True)
    for room in (choice, randomized_svd):
        monkeypatch.setattr(room, "kernels_for", lambda t: found)
        monkeypatch.setattr(room, "on_device", device_of)
    return noted


def test_kernels_are_launched_on_the_device_of_their_arguments(launched):
    w = torch.randn(2, 12, 12)
    randomized_svd.batched_randomized_svd(w, 3, end="head")
    randomized_svd.batched_randomized_svd(w, 3, oversample=2)
    found = TwoSided(*torch.linalg.svd(w))
    choice.highest_rates(found, torch.randn(2, 2, 12), torch.randn(2, 12, 2), 3, 1.0, 1e-6)
    assert launched == [("sketch", (2, 12, 12)), ("jacobi", (2, 12, 5)), ("rates", (2, 12))]


def test_the_current_device(monkeypatch):
    entered = []
    monkeypatch.setattr("torch.cuda.device", lambda device: entered.append(device) or contextlib.nullcontext())
    with kernels.on_device(SimpleNamespace(is_cuda=True, device=torch.device("cuda", 1))):
        assert entered == [torch.device("cuda", 1)]
    with kernels.on_device(torch.ones(1)):
        assert len(entered) == 1


@pytest.mark.parametrize("name", ["cpu", "mps", "xpu", "meta"])
def test_devices_without_a_compute_capability(name):
    assert policy.has_fast_float64(torch.device(name)) is None
