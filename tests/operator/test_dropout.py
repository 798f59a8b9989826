"""The dropout mask: the published Philox, equal bits on every backend, one mask per forward and its backward."""

from __future__ import annotations

import pytest
import torch
from support.devices import plain_dtype
from support.promises import check_same
from torch.utils.checkpoint import checkpoint

from loradash_kernels import dash_linear
from loradash_kernels.backends import extension
from loradash_kernels.random import dropout_mask, dropout_threshold, keep_scale, philox_words
from loradash_kernels.testing import make_case, run

compiled = pytest.mark.skipif(not extension.is_compiled(), reason="the compiled part is missing")


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    # These are known answers of Random123.
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_known_answers(counter, key, expected):
    def signed(low, high):
        value = low | high << 32
        return value - 2**64 if value >= 2**63 else value

    seed = torch.tensor([signed(*key), signed(*counter[2:])])
    words = philox_words(seed, torch.tensor([counter[1]]), torch.tensor([counter[0]]))
    assert tuple(int(w) for w in words) == expected


@compiled
@pytest.mark.parametrize(("m", "k"), [(1, 1), (3, 31), (40, 64), (7, 1000), (2, 5000), (0, 5), (5, 0), (0, 0)])
@pytest.mark.parametrize("p", [1e-4, 0.05, 0.5, 0.999])
def test_same_bits_as_the_reference(m, k, p):
    seed = torch.randint(-(2**63), 2**63 - 1, (2,), dtype=torch.int64)
    threshold = dropout_threshold(p)
    assert torch.equal(torch.ops.loradash_cpu.dropout_mask(seed, threshold, m, k), dropout_mask(seed, threshold, m, k))


def test_share_of_kept_elements():
    seed = torch.tensor([123, -456])
    for p in (0.05, 0.5):
        kept = dropout_mask(seed, dropout_threshold(p), 512, 512).double().mean()
        assert abs(float(kept) - (1 - p)) < 5 * (p * (1 - p)) ** 0.5 / 512


def test_probability_is_rounded_and_the_scale_fits():
    assert dropout_threshold(0.05) == round(0.05 * 65536)
    assert keep_scale(32768) == 2.0
    assert dropout_threshold(0.9999999) == 65535


def test_seeds_decide(backend, device):
    case = make_case(30, 40, 50, dtype=plain_dtype(backend), dropout_p=0.5, device=device)
    first = run(case, backend)
    check_same(case, backend, first, run(case, backend))
    case.seed += 1
    assert not torch.equal(run(case, backend)["y"], first["y"])


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint_recomputes_the_same_mask(backend, device, reentrant):
    case = make_case(33, 48, 40, dtype=plain_dtype(backend), dropout_p=0.3, device=device)

    def results(recompute):
        torch.manual_seed(case.seed)
        leaves = {
            n: v.clone().requires_grad_(n not in ("weight", "dash_u", "dash_vt")) for n, v in case.tensors.items()
        }
        grads = {n: v for n, v in leaves.items() if v.requires_grad}
        x, weight, bias = (leaves.pop(n) for n in ("x", "weight", "bias"))

        def layer(x):
            return dash_linear(x, weight, bias, scaling=case.scaling, dropout_p=0.3, backend=backend, **leaves)

        y = checkpoint(layer, x, use_reentrant=reentrant) if recompute else layer(x)
        y.backward(case.dy)
        return {"y": y.detach(), **{n: v.grad for n, v in grads.items()}}

    check_same(case, backend, results(False), results(True))
