"""Pre-launch on the device: directions against a float64 SVD there, exact beside randomized, batches, whole models, the cache."""

from __future__ import annotations

import math

import loradash
import pytest
import torch
from loradash.cache import SpectralCache
from support.matrix import need_memory
from support.spectra import update, with_spectrum
from torch import nn

from loradash_kernels import batched_randomized_svd, change_rates, task_specific_directions
from loradash_kernels.backends.triton import backend as triton_backend
from loradash_kernels.directions import kernels
from loradash_kernels.directions.checks import MAX_RELATIVE_ERROR

S = 8


@pytest.fixture(autouse=True)
def _kernels_serve_the_interpreter(monkeypatch):
    """The rehearsal under Triton's interpreter takes the kernels, too."""
    if triton_backend.interpreted():
        monkeypatch.setattr(kernels, "KERNEL_DEVICES", {"cuda", "cpu"})


def tailed(n, k, seed, condition=1e4):
    """(n, k) in float64: 24 singular values fall from 0.1 to 2 / condition, the others lie between 1 and 2."""
    end = torch.logspace(-1, math.log10(2 / condition), 24)
    return with_spectrum(torch.cat((torch.linspace(2, 1, min(n, k) - 24), end)), n, k, seed)


def weights(shape, conditions, device):
    """A batch of matrices (len(conditions), N, K) in float64, of these condition numbers, and an update of each."""
    w = torch.stack([tailed(*shape, i, c) for i, c in enumerate(conditions)]).to(device)
    return w, *(t.to(device) for t in update(*shape, batch=(len(conditions),)))


def check_directions(found, w, a, b, conditions):
    """No other directions change more, but for what float32 leaves undecided of the smallest sigma."""
    truth = change_rates(w, a.double(), b.double(), method="exact")
    unit = torch.finfo(torch.float32).eps
    undecided = MAX_RELATIVE_ERROR + 8 * unit * torch.tensor(conditions, device=w.device).unsqueeze(-1)
    picked = truth.rate.gather(-1, found.index).sort(descending=True).values
    assert (picked >= truth.rate.topk(S).values * (1 - undecided)).all()
    assert (found.index.sort().values.diff() > 0).all(), "a direction was chosen twice"
    residual = w @ found.vt.double().mT - found.u.double() * found.sigma.double().unsqueeze(-2)
    assert (residual.norm(dim=-2) <= 1e-4 * truth.sigma[..., :1]).all()
    assert found.u.device.type == w.device.type


METHODS = [(m, f) for m in ("auto", "exact") for f in ("square", "tall", "wide")]


@pytest.mark.parametrize(("method", "form"), METHODS)
def test_directions(device, sizes, method, form):
    conditions = (1e3, 1e4, 1e5)
    long, short = sizes.matrix
    w, a, b = weights(
        {"square": (short, short), "tall": (long, short), "wide": (short, long)}[form], conditions, device
    )
    found = task_specific_directions(w.float(), a, b, S, method=method)
    check_directions(found, w, a, b, conditions)


def test_randomized_directions_are_those_of_the_exact_method(device, sizes):
    """Where the best lie in the tail, as they do in trained layers. The lesser of the eight may lie where it is flat."""
    conditions = (1e4, 2e4, 5e4)
    w, a, b = weights((sizes.matrix[1],) * 2, conditions, device)
    found, exact = (task_specific_directions(w.float(), a, b, S, method=m) for m in ("randomized", "exact"))
    assert set(found.routes) == {"tail"} and "tail" not in exact.routes
    check_directions(found, w, a, b, conditions)
    torch.testing.assert_close(found.rate[..., :4], exact.rate[..., :4], rtol=0.05, atol=0)


def test_the_tail_is_that_of_the_svd(device, sizes):
    """The randomized method beside LAPACK's or the GPU library's SVD in float64: singular values and both subspaces."""
    w, *_ = weights((sizes.matrix[1],) * 2, (1e4, 2e4, 5e4), device)
    u, sigma, vt = batched_randomized_svd(w.float(), 16)
    true_u, true_sigma, true_vt = torch.linalg.svd(w)
    torch.testing.assert_close(sigma[..., -8:].double(), true_sigma[..., -8:], rtol=0.02, atol=1e-6)
    for ours, theirs in ((u.mT, true_u.mT[..., -8:, :]), (vt, true_vt[..., -8:, :])):
        inside = torch.linalg.svdvals(theirs @ ours.double().mT)
        assert inside.min() > 0.99, "a direction of the tail is not in the subspace"


def test_the_same_input_gives_the_same_bits(device, sizes):
    w, a, b = weights((sizes.matrix[1],) * 2, (1e4, 1e5), device)
    one, two = (task_specific_directions(w.float(), a, b, S) for _ in range(2))
    assert one.routes == two.routes
    assert all(torch.equal(x, y) for x, y in zip(one[:5], two[:5], strict=True))


def test_a_model_in_batches(device, sizes, monkeypatch):
    """Layers of one shape together, as many at a time as there is room for: whatever the batches, the same quality."""
    torch.manual_seed(0)
    n = sizes.matrix[1] // 2
    model = nn.Sequential(*(nn.Linear(n, n, bias=False) for _ in range(3))).to(device)
    spectra = [tailed(n, n, seed).to(device) for seed in range(3)]
    with torch.no_grad():
        for layer, w in zip(model, spectra, strict=True):
            layer.weight.copy_(w)
    loradash.apply_dash(model, loradash.DashConfig(r=4, directions=S))
    for layer in loradash.dash_layers(model).values():
        nn.init.normal_(layer.lora_b, std=0.01)
    kept = {name: t.clone() for name, t in model.state_dict().items()}
    for at_a_time in (3, 2):
        model.load_state_dict(kept)
        monkeypatch.setitem(loradash.prelaunch.__globals__, "batch_elements", lambda _, size=at_a_time: size * n * n)
        reports = loradash.prelaunch(model, progress=False)
        assert len(reports) == 3
        for layer, report in zip(loradash.dash_layers(model).values(), reports, strict=True):
            w, a, b = (t.detach().double() for t in (layer.weight, layer.lora_a, layer.lora_b))
            truth = change_rates(w, a, b, scaling=layer.scaling, method="exact")
            picked = truth.rate[report.index.to(device)].sort(descending=True).values
            assert (picked >= 0.99 * truth.rate.topk(S).values).all()
            assert layer.dash_u.device.type == device.type and bool(layer.launched)


def test_a_cache_serves_every_device(device, sizes, tmp_path):
    """What the device has decomposed is found again from the CPU's copy of the weight, and the other way round."""
    w, a, b = weights((sizes.matrix[1],) * 2, (1e4,), device)
    w, a, b = w[0].float(), a[0], b[0]
    cache = SpectralCache(tmp_path)
    first = cache.directions(w, a, b, S, 1.0)
    files = sorted(tmp_path.iterdir())
    assert cache.has(w.cpu()) and cache.has(w)
    again, on_cpu = cache.directions(w, a, b, S, 1.0), cache.directions(w.cpu(), a.cpu(), b.cpu(), S, 1.0)
    assert sorted(tmp_path.iterdir()) == files, "it was decomposed again"
    assert first.u.device.type == device.type and on_cpu.u.device.type == "cpu"
    for found in (again, on_cpu):
        assert torch.equal(found.index.cpu(), first.index.cpu())
        torch.testing.assert_close(found.rate.cpu(), first.rate.cpu(), rtol=1e-3, atol=0)
    check_directions(first, w.double(), a, b, [1e4])


def test_a_weight_of_a_model(device, sizes):
    """4096 x 4096 on a card, as models have them: found, finite, orthogonal, and right by their residuals."""
    n = sizes.weight
    need_memory(device, 40 * 4e-9 * n * n)
    g = torch.Generator(device).manual_seed(0)
    w = torch.randn(n, n, generator=g, device=device) / n**0.5
    a, b = (0.01 * torch.randn(size, generator=g, device=device) for size in ((16, n), (n, 16)))
    found = task_specific_directions(w, a, b, S)
    eye = torch.eye(S, device=device)
    torch.testing.assert_close(found.u.mT @ found.u, eye, rtol=0, atol=1e-4)
    torch.testing.assert_close(found.vt @ found.vt.mT, eye, rtol=0, atol=1e-4)
    residual = w.double() @ found.vt.double().mT - found.u.double() * found.sigma.double()
    assert residual.norm(dim=0).max() < 1e-4
    assert (found.rate[:-1] >= found.rate[1:]).all() and bool(found.rate.isfinite().all())
