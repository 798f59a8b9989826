"""Decompositions ahead of time: spectra, what is chosen from them, and pre-launch over processes."""

from __future__ import annotations

import math
import os
import subprocess
import sys

import loradash
import pytest
import torch
from loradash import DashConfig, DashSchedule, apply_dash
from torch import nn

from loradash_kernels import change_rates, task_specific_directions
from loradash_kernels.directions.routes import residuals
from loradash_kernels.directions.spectrum import Spectrum, choose_directions, decompose


def gaussian(n, k, seed=0):
    """Graded at the small end where square, flat where not; and factors of an update."""
    g = torch.Generator().manual_seed(seed)
    w = torch.randn(n, k, generator=g) / k**0.5
    return w, 0.01 * torch.randn(8, k, generator=g), 0.01 * torch.randn(n, 8, generator=g)


def with_singular_values(sigma, seed=0):
    n = len(sigma)
    g = torch.Generator().manual_seed(seed)
    u, v = (torch.linalg.qr(torch.randn(n, n, generator=g, dtype=torch.float64))[0] for _ in range(2))
    return ((u * sigma) @ v.mT).float()


# --- spectra ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "k"), [(384, 384), (96, 400), (400, 96)])
def test_choice_from_a_spectrum(n, k):
    """The same directions as from W itself, by the exact route in float64; vectors to full precision from half."""
    w, a, b = gaussian(n, k)
    (spectrum,) = decompose(w)
    assert spectrum.route == ("tail" if n == k else "gram float32")
    found = choose_directions(spectrum, w, a, b, 8, scaling=2.0)
    exact = task_specific_directions(w.double(), a.double(), b.double(), 8, scaling=2.0, method="exact")
    assert found.index.tolist() == exact.index.tolist()
    torch.testing.assert_close(found.rate.double(), exact.rate, rtol=1e-3, atol=0)
    torch.testing.assert_close(found.sigma.double(), exact.sigma, rtol=1e-4, atol=1e-7)
    for ours, theirs in ((found.u.mT, exact.u.mT), (found.vt, exact.vt)):
        assert ((ours.double() * theirs).sum(-1).abs() > 1 - 1e-5).all()
    assert (residuals(w[None], found.u[None], found.vt[None], found.sigma[None]) <= 1e-5).all()


def test_half_precision_is_half_the_memory():
    w, _, _ = gaussian(96, 400)
    (spectrum,) = decompose(w)
    assert spectrum.bytes == 96 * 96 * 2 + 96 * 4
    assert spectrum.u.dtype == torch.float16 and spectrum.vt is None


def rectangular(n, k, condition, shape, seed=0):
    """A weight (n, k) of this condition number whose spectrum falls evenly, in one last step, or off a cliff."""
    short, g = min(n, k), torch.Generator().manual_seed(seed)
    few = short // 4
    sigma = {
        "graded": torch.logspace(0, -math.log10(condition), short, dtype=torch.float64),
        "one small": torch.cat((torch.linspace(2, 1, short - 1), torch.tensor([2 / condition]))).double(),
        "cliff": torch.cat((torch.linspace(2, 1, short - few), torch.linspace(3, 2, few) / condition)).double(),
    }[shape]
    u, v = (torch.linalg.qr(torch.randn(size, short, generator=g, dtype=torch.float64))[0] for size in (n, k))
    return ((u * sigma) @ v.mT).float()


@pytest.mark.parametrize("shape", ["graded", "one small", "cliff"])
@pytest.mark.parametrize(("n", "k"), [(64, 96), (96, 64), (128, 512)])
def test_every_condition_is_served_from_what_is_kept(n, k, shape):
    """Half a basis in half precision where W allows it, all triplets in float32 where not: the directions of W itself."""
    _, a, b = gaussian(n, k)
    for condition in (3, 30, 49, 51, 100, 300, 1e3, 1e4, 1e5, 1e6):
        w = rectangular(n, k, condition, shape)
        (spectrum,) = decompose(w)
        halved = spectrum.u is None or spectrum.vt is None
        assert halved == (condition < 50)
        assert spectrum.bytes == (2 * min(n, k) ** 2 if halved else 4 * min(n, k) * (n + k)) + 4 * min(n, k)
        found, plain = choose_directions(spectrum, w, a, b, 8), task_specific_directions(w, a, b, 8)
        assert found is not None, condition
        assert found.index.sort().values.tolist() == plain.index.sort().values.tolist(), condition
        order = [plain.index.tolist().index(i) for i in found.index.tolist()]
        for ours, theirs in ((found.u.mT, plain.u.mT), (found.vt, plain.vt)):
            assert ((ours * theirs[order]).sum(-1).abs() > 0.999).all(), condition
            torch.testing.assert_close(ours @ ours.mT, torch.eye(8), atol=5e-4, rtol=0)


@pytest.mark.parametrize(("n", "k"), [(48, 48), (32, 80), (80, 32)])
@pytest.mark.parametrize("rank", [0, 1, 20, 31])
def test_deficient_weights_are_kept_orthonormal(n, k, rank):
    """Null spaces have no directions of their own, but what is chosen from them is orthonormal on both sides."""
    g = torch.Generator().manual_seed(0)
    w = torch.randn(n, rank, generator=g) @ torch.randn(rank, k, generator=g) / 10
    _, a, b = gaussian(n, k)
    for method in ("auto", "exact"):
        (spectrum,) = decompose(w, method)
        found = choose_directions(spectrum, w, a, b, 6)
        if found is None and spectrum.route == "tail":
            continue  # too short for this null space: the full spectrum's turn
        assert found is not None and torch.isfinite(found.rate).all()
        for basis in (found.u.mT, found.vt):
            torch.testing.assert_close(basis @ basis.mT, torch.eye(6), atol=1e-4, rtol=0)
        assert (w @ found.vt.mT - found.u * found.sigma).abs().max() < 1e-5


def test_a_spectrum_without_directions_is_refused():
    """Zero vectors have no residual where σ is zero; they are no directions."""
    _, a, b = gaussian(6, 8)
    spectrum = Spectrum("svd float32", torch.zeros(6), torch.zeros(6, 6), torch.eye(6, 8))
    assert choose_directions(spectrum, torch.zeros(6, 8), a, b, 3) is None


def test_float64_is_kept_in_float64():
    w = rectangular(64, 96, 1e5, "graded").double()
    _, a, b = gaussian(64, 96)
    (spectrum,) = decompose(w)
    assert spectrum.u.dtype == torch.float64
    found, plain = (choose_directions(spectrum, w, a.double(), b.double(), 8), task_specific_directions(w, a, b, 8))
    torch.testing.assert_close(found.rate, plain.rate, rtol=1e-9, atol=0)


def test_clustered_spectrum():
    """Twenty equal singular values have no directions of their own, but the chosen triplets are triplets."""
    sigma = torch.cat((torch.linspace(3, 1.5, 44, dtype=torch.float64), torch.ones(20, dtype=torch.float64)))
    w = with_singular_values(sigma)
    _, a, b = gaussian(64, 64, seed=1)
    (spectrum,) = decompose(w)
    found = choose_directions(spectrum, w, a, b, 6)
    assert (residuals(w[None], found.u[None], found.vt[None], found.sigma[None]) < 1e-3).all()
    torch.testing.assert_close(found.u.mT @ found.u, torch.eye(6), atol=1e-3, rtol=0)


def test_rank_deficient():
    w = with_singular_values(
        torch.cat((torch.linspace(2, 1, 60, dtype=torch.float64), torch.zeros(4, dtype=torch.float64)))
    )
    _, a, b = gaussian(64, 64, seed=1)
    (spectrum,) = decompose(w, "exact")
    found = choose_directions(spectrum, w, a, b, 4)
    assert spectrum.sigma[60:].max() < 1e-5 and (found.index >= 60).all()  # the rate of a zero σ is |δ| / eps


def test_exact_has_every_triplet():
    w, a, b = gaussian(128, 128)
    (spectrum,) = decompose(w, "exact")
    assert spectrum.sigma.shape == (128,)
    rates = change_rates(w, a, b, method="exact").rate
    assert choose_directions(spectrum, w, a, b, 5).index.tolist() == rates.topk(5).indices.tolist()


def test_deterministic_and_batched():
    many = torch.stack([gaussian(128, 128, seed=s)[0] for s in range(3)])
    together, again = decompose(many), decompose(many)
    assert all(((x.u * y.u).sum(0).abs() > 1 - 1e-4).all() for x, y in zip(together, again, strict=True))
    assert len(together) == 3


def test_another_weights_spectrum_is_refused():
    w, a, b = gaussian(96, 400)
    other, _, _ = gaussian(96, 400, seed=1)
    assert choose_directions(decompose(other)[0], w, a, b, 8) is None


@pytest.mark.parametrize("s", [0, 500])
def test_bad_number_of_directions(s):
    w, a, b = gaussian(96, 400)
    with pytest.raises(ValueError, match=f"s is {s}"):
        choose_directions(decompose(w)[0], w, a, b, s)


# --- pre-launch ------------------------------------------------------------------------------------------------------


def trained(steps=2, **config):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(48, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 8))
    apply_dash(model, DashConfig(r=2, directions=3, prelaunch_steps=3, **config))
    schedule = DashSchedule(model, progress=False)
    step(model, schedule, steps)
    return model, schedule


def step(model, schedule, steps):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(steps):
        model(torch.ones(4, 48)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()


def test_interrupt_leaves_pre_launch(monkeypatch):
    """Ctrl-C in the middle: no layer has launched, and the next step tries again."""
    model, schedule = trained()
    real, calls = loradash.prelaunch.__globals__["task_specific_directions"], []

    def interrupted(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setitem(loradash.prelaunch.__globals__, "task_specific_directions", interrupted)
    with pytest.raises(KeyboardInterrupt):
        step(model, schedule, 1)
    layers = loradash.dash_layers(model).values()
    assert not schedule.launched and all(layer.dash_u.abs().sum() == 0 for layer in layers)
    step(model, schedule, 1)
    assert schedule.launched and all(layer.launched for layer in layers)


def test_shares_are_even():
    from loradash.distributed import share_out

    costs = {f"layer {i}": float(c) for i, c in enumerate((9, 1, 1, 1, 5, 5, 2, 2, 4, 6))}
    shares = share_out(costs, 3)
    assert sorted(name for share in shares for name in share) == sorted(costs)
    assert max(sum(costs[n] for n in share) for share in shares) <= 13
    assert share_out({}, 2) == [[], []]


WORKER = """
import os, sys, torch
from torch import nn
import torch.distributed as dist
import loradash
module = sys.modules["loradash.prelaunch"]
rank, store, mode = int(sys.argv[1]), sys.argv[2], sys.argv[3]
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(48, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 8))
loradash.apply_dash(model, loradash.DashConfig(r=2, directions=3))
with torch.no_grad():
    for layer in loradash.dash_layers(model).values():
        layer.lora_b.normal_()
if mode == "plain":
    import copy
    finder = copy.deepcopy(model)
if mode == "fsdp":
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    mesh = init_device_mesh("cpu", (2,))
    for layer in loradash.dash_layers(model).values():
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
if mode == "fails" and rank == 1:
    def broken(*args, **kwargs):
        raise ValueError("the disk is on fire")
    module.task_specific_directions = broken
try:
    reports = loradash.prelaunch(model, progress=False)
except (RuntimeError, ValueError) as error:
    assert mode == "fails", error
    assert ("process 1" in str(error) and "on fire" in str(error)) if rank == 0 else "on fire" in str(error), error
    assert not any(layer.launched for layer in loradash.dash_layers(model).values())
else:
    assert mode != "fails" and len(reports) == 3
    for layer in loradash.dash_layers(model).values():
        assert bool(layer.launched)
        both = [torch.zeros_like(layer.dash_u) for _ in range(2)]
        dist.all_gather(both, layer.dash_u.contiguous())
        assert torch.equal(*both) and both[0].abs().sum() > 0
    if mode == "plain":
        dist.barrier()
        module.place = lambda: (0, 1)
        loradash.prelaunch(finder, progress=False)
        for ours, theirs in zip(loradash.dash_layers(model).values(), loradash.dash_layers(finder).values()):
            # found in batches of other sizes: the library's sums may differ
            assert ((ours.dash_u * theirs.dash_u).sum(0).abs() > 1 - 1e-4).all()
            assert ((ours.dash_vt * theirs.dash_vt).sum(1).abs() > 1 - 1e-4).all()
dist.barrier()
dist.destroy_process_group()
os._exit(0)  # every assertion has passed; the interpreter's exit now and then aborts in gloo's threads ("terminate called")
"""


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["plain", "fails", "fsdp"])
def test_two_processes(tmp_path, mode):
    """Layers are shared out; both end with the directions that one process finds; a failure reaches both."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    command = [sys.executable, "-c", WORKER]
    workers = [
        subprocess.Popen(
            [*command, str(rank), str(tmp_path / "store"), mode], env=env, stderr=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]
    for worker in workers:
        _, errors = worker.communicate(timeout=600)
        assert worker.returncode == 0, errors
