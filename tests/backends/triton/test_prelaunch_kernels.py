"""The kernels of the pre-launch phase, executed without a GPU: interpreted, and from their PTX in the emulator, against
float64 LAPACK on graded, clustered, deficient and real spectra."""

from __future__ import annotations

import pytest
import torch
from support import triton_emulation as emulation
from support.spectra import graded, update, with_spectrum

from loradash_kernels import batched_randomized_svd, change_rates, task_specific_directions
from loradash_kernels.backends.triton import backend as triton_backend
from loradash_kernels.directions import kernels
from loradash_kernels.random import philox_words

interpreted = pytest.mark.skipif(
    not triton_backend.interpreted(), reason="runs within test_operator_in_the_interpreter, as a process of its own"
)
emulated = [
    pytest.mark.emulated,
    pytest.mark.skipif(
        triton_backend.interpreted() or emulation.missing_tools() is not None,
        reason=str(emulation.missing_tools() or "this is the interpreter"),
    ),
]
if emulation.missing_tools() is None:
    from loradash_kernels.backends.triton import prelaunch, tiles

EPS = torch.finfo(torch.float32).eps
SEED = torch.tensor([0x1234_5678_9ABC, 77])


def gaussian(rows, columns):
    """The sketch in plain PyTorch: quantiles of Philox's words."""
    blocks = torch.arange((columns + 3) // 4)[None, :]
    words = torch.stack(philox_words(SEED, torch.arange(rows)[:, None], blocks), -1).reshape(rows, -1)[:, :columns]
    signed = torch.where(words >= 2**31, words - 2**32, words).float() * 2.0**-31
    return 2**0.5 * torch.erfinv(signed.clamp(-0.99999994, 0.99999994))


def check_sketch(w, y):
    wide = w.double() @ gaussian(w.shape[-1], y.shape[-1]).to(w.dtype).double()
    size = w.double().abs() @ gaussian(w.shape[-1], y.shape[-1]).double().abs()
    # A quantile on the edge of two 16-bit numbers may round either way.
    unit = 4e-6 if w.dtype == torch.float32 else 1e-3
    assert float(((y.double() - wide).abs() / size).max()) < unit


def spectra():
    """A batch of mixed conditioning: graded, clustered, deficient, equal, tiny."""
    n, k = 23, 37
    return torch.stack(
        [
            graded(n, k, condition=1e6),
            with_spectrum([1.0] * 10 + [1e-3] * 13, n, k),
            with_spectrum([1, 0.5, 0.1], n, k),
            with_spectrum([1.0] * n, n, k),
            1e-30 * graded(n, k, seed=3, condition=10),
            torch.zeros(n, k, dtype=torch.float64),
        ]
    ).float()


def check_jacobi(x, rotated, off):
    """Singular values to the accuracy of LAPACK, orthogonal rows, and the row space of x."""
    sigma = torch.linalg.vector_norm(rotated.double(), dim=-1).sort(-1, descending=True).values
    true = torch.linalg.svdvals(x.double())
    assert torch.all((sigma - true).abs() <= 64 * EPS * true[:, :1])
    assert torch.all(off <= prelaunch.ORTHOGONAL)
    gram = rotated.double() @ rotated.double().mT
    outer = torch.linalg.vector_norm(rotated.double(), dim=-1)
    assert torch.all(
        (gram - torch.diag_embed(gram.diagonal(dim1=-2, dim2=-1))).abs()
        <= 2e-5 * outer[..., :, None] * outer[..., None, :] + 64 * EPS**2 * true[:, :1, None] ** 2
    )
    # Rotations from the left keep the Gram matrix of the columns.
    back = x.double().mT @ x.double() - rotated.double().mT @ rotated.double()
    assert torch.all(torch.linalg.matrix_norm(back) <= 256 * EPS * true[:, 0] ** 2 + 1e-300)


def run_emulated(launch, architecture="sm_80", **options):
    compiled = emulation.compile_launch(launch, architecture)
    report = emulation.resources(compiled, tiles.TARGETS[architecture])
    assert report.problems(tiles.TARGETS[architecture]) == []
    return emulation.emulate(launch, compiled, **options)


class TestEmulated:
    pytestmark = emulated

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    @pytest.mark.parametrize(("count", "n", "k", "width"), [(1, 1, 1, 1), (2, 70, 50, 20), (1, 130, 33, 150)])
    def test_sketch(self, count, n, k, width, dtype):
        w = torch.randn(count, k, n, dtype=dtype).mT
        y = torch.full((count, n, width), float("nan"))
        run_emulated(prelaunch.plan_sketch(w, SEED, y), seed=1)
        check_sketch(w, y)

    def test_sketch_by_three_products(self):
        """TF32x3, which a GPU takes for float32."""
        w, y = torch.randn(1, 80, 48), torch.full((1, 80, 24), float("nan"))
        run_emulated(prelaunch.plan_sketch(w, SEED, y, "tf32x3"))
        check_sketch(w, y)

    @pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
    @pytest.mark.parametrize("seed", [0, 1, 2])
    def test_jacobi(self, architecture, seed):
        x = spectra()
        peak = x.abs().amax((-2, -1), keepdim=True).clamp_min(1e-37)
        rotated, off = x / peak, torch.full((x.shape[0],), float("nan"))
        scaled = rotated.clone()
        run_emulated(prelaunch.plan_jacobi(rotated, off), architecture, seed=seed)
        check_jacobi(scaled, rotated, off)

    @pytest.mark.parametrize("n", [1, 2, 3, 16, 33])
    def test_jacobi_sizes(self, n):
        x, off = torch.randn(2, n, n), torch.full((2,), float("nan"))
        rotated = x.clone()
        run_emulated(prelaunch.plan_jacobi(rotated, off))
        check_jacobi(x, rotated, off)

    def test_jacobi_at_the_width_of_a_tail(self):
        """Rows of 96: several pairs to a turn, several turns to a step."""
        x = torch.linalg.qr(graded(96, condition=1e5))[1].float()[None].contiguous()
        off = torch.full((1,), float("nan"))
        rotated = x.clone()
        run_emulated(prelaunch.plan_jacobi(rotated, off))
        check_jacobi(x, rotated, off)

    @pytest.mark.parametrize("one_sided", [False, True])
    @pytest.mark.parametrize(
        ("n", "rows", "k", "r", "s"), [(37, 50, 41, 3, 5), (8, 8, 20, 16, 8), (100, 130, 100, 40, 1)]
    )
    @pytest.mark.parametrize("seed", [0, 4])
    def test_rates(self, n, rows, k, r, s, one_sided, seed):
        check_rates(run_emulated, n, rows, k, r, s, one_sided, seed=seed, sms=2, ctas_per_sm=1)


def check_rates(run, n, rows, k, r, s, one_sided, **options):
    torch.manual_seed(0)
    u, v = torch.randn(2, n, rows).mT, torch.randn(2, k, n)
    b, at, sigma = torch.randn(2, rows, r), torch.randn(2, r, k).mT, torch.rand(2, n) + 0.01
    if one_sided:
        v, at = u, torch.randn(2, rows, r)
    out = torch.full((2, n), float("nan")), torch.full((2, s), float("nan")), torch.full((2, s), -9)
    run(prelaunch.plan_rates(u, v, sigma, b, at, 3.0, 1e-6, one_sided, out), **options)
    left, right = u.double().mT @ b.double(), v.double().mT @ at.double()
    true = 3 * (left * right).sum(-1).abs() / (sigma.double() if one_sided else 1) / (sigma.double() + 1e-6)
    size = 3 * (left.abs() * right.abs()).sum(-1) / (sigma.double() if one_sided else 1) / (sigma.double() + 1e-6)
    assert float(((out[0].double() - true).abs() / size).max()) < 3e-5
    best, index = out[0].topk(s)
    assert torch.equal(out[1], best)
    assert torch.equal(out[0].gather(-1, out[2]), best) and torch.equal(out[2], index)


@pytest.fixture
def on_the_cpu(monkeypatch):
    monkeypatch.setattr(kernels, "KERNEL_DEVICES", {"cpu"})


@interpreted
class TestTritonInterpreted:
    def test_svd(self, on_the_cpu):
        w = torch.stack([graded(40, seed=i, condition=10.0 ** (i + 2)) for i in range(3)]).float()
        for end in ("tail", "head"):
            u, sigma, vt = batched_randomized_svd(w, 3, end=end, power_iters=3)
            full = torch.linalg.svdvals(w.double())
            torch.testing.assert_close(
                sigma.double(), full[:, -3:] if end == "tail" else full[:, :3], rtol=2e-3, atol=0
            )
            for basis in (u, vt.mT):
                torch.testing.assert_close(basis.mT @ basis, torch.eye(3).expand(3, 3, 3), rtol=0, atol=1e-4)

    def test_same_directions_as_the_library(self, on_the_cpu, monkeypatch):
        w = torch.stack([graded(48, seed=i, condition=3e3) for i in range(2)]).float()
        a, b = update(48, 48, batch=(2,))
        ours = task_specific_directions(w, a, b, 4)
        assert ours.routes == ("tail", "tail")
        again = task_specific_directions(w, a, b, 4)
        assert all(torch.equal(x, y) for x, y in zip(ours[:5], again[:5], strict=True))
        monkeypatch.setattr(kernels, "KERNEL_DEVICES", set())
        truth = change_rates(w.double(), a.double(), b.double(), method="exact").rate.topk(4)
        assert torch.equal(ours.index, truth.indices)
        torch.testing.assert_close(ours.rate.double(), truth.values, rtol=2e-2, atol=0)

    def test_rectangular(self, on_the_cpu):
        w = graded(24, 80, condition=20).float()
        a, b = update(24, 80)
        ours = task_specific_directions(w, a, b, 4)
        assert ours.routes == ("gram float32",)
        truth = change_rates(w.double(), a.double(), b.double(), method="exact").rate.topk(4).indices
        assert torch.equal(ours.index, truth)

    def test_jacobi_of_nothing(self, on_the_cpu):
        sigma, vt, converged = prelaunch.jacobi(torch.zeros(0, 4, 4))
        assert sigma.shape == (0, 4) and vt.shape == (0, 4, 4) and converged.shape == (0,)
