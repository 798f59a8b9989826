"""Fingerprints of weights: the same in every layout and on every device, another after every write."""

from __future__ import annotations

import itertools

import pytest
import torch
from loradash import SpectralCache
from loradash import fingerprint as module
from loradash.fingerprint import EXACT, KEYS, fingerprint

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def test_matrices_are_told_apart():
    w = torch.arange(12.0).view(3, 4) / 7
    same = [w.clone(), w.t().contiguous().t(), torch.cat((w, w))[:3], torch.cat((w, w), 1)[:, :4]]
    assert {fingerprint(t) for t in same} == {fingerprint(w)}
    assert fingerprint(w.half()) == fingerprint(w.half().float())
    assert fingerprint(w.bfloat16()) == fingerprint(w.bfloat16().float())
    others = [w.t(), w.view(4, 3), w.half(), w.bfloat16(), w.double(), w + 1e-6]
    names = [name for t in [w, *others] for name in fingerprint(t)]
    # A matrix and its transpose have the same two names, which are the only ones that repeat.
    assert len({*names}) == len(names) - 2


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (5, 7), (64, 3), (0, 4), (4, 0)])
def test_the_transpose_goes_along(shape, dtype):
    w = torch.randn(shape).to(dtype)
    found = fingerprint(w)
    assert fingerprint(w.t().contiguous()) == fingerprint(w.t()) == found[::-1]


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_bit_counts(dtype):
    """Each bit of an element, changed alone, and two neighbours, two rows or two columns that change places."""
    w = torch.randn(6, 9).to(dtype)
    words = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    changed = []
    for bit in range(8 * dtype.itemsize):
        other = w.clone()
        other.view(words)[3, 5] ^= -(2**bit) if bit == 8 * dtype.itemsize - 1 else 2**bit
        changed.append(other)
    rows, columns, neighbours = w.clone(), w.clone(), w.clone()
    rows[[1, 4]], columns[:, [2, 7]] = w[[4, 1]], w[:, [7, 2]]
    neighbours[2, 3], neighbours[2, 4] = w[2, 4], w[2, 3]
    changed += [rows, columns, neighbours, -w]
    names = [name for t in [w, *changed] for name in fingerprint(t)]
    assert len({*names}) == len(names)


def test_the_number_of_rows_at_a_time_does_not_count(monkeypatch):
    w = torch.randn(50, 30)
    whole = fingerprint(w)
    monkeypatch.setattr(module, "CPU_ELEMENTS", 100)
    assert fingerprint(w) == whole


def test_sums_are_exact():
    """Against Python's integers: no rounding that another device might do otherwise."""
    w = torch.tensor([[-1.0, 3.5e38, 1e-45], [float("inf"), -0.0, -3.4e38]])
    rows, columns = module._sums(w)
    bits = w.view(torch.int32).tolist()
    keys = module._keys(3).to(torch.int64).tolist()
    for half, key in itertools.product(range(2), range(KEYS)):
        numbers = [[(b & 0xFFFF) if half == 0 else b >> 16 for b in row] for row in bits]
        assert rows[half, key].tolist() == [sum(v * keys[key][j] for j, v in enumerate(row)) for row in numbers]
        wanted = [sum(numbers[i][j] * keys[key][i] for i in range(2)) for j in range(3)]
        assert columns[half, key].tolist() == wanted
    assert EXACT * 2**16 * 2**15 <= 2**53


def test_names_do_not_change():
    """What a release writes the next one finds: these are the names of today."""
    w = torch.arange(6.0).view(2, 3)
    assert fingerprint(w).itself == "544c7f84d158c220048e9a38ab7443b66ba6db75"


def test_writes_that_no_version_counts():
    """One element in many, by `.data`, NumPy or another view, as a merged adapter changes a weight of 16 bits."""
    w = torch.randn(300, 200).bfloat16()
    view, array = w.view(-1), w.view(torch.int16).numpy()
    names, version = [fingerprint(w)], w._version
    for write in (lambda: w.data[250, 3].add_(1), lambda: view.data[777].neg_(), lambda: array.__setitem__((9, 8), 5)):
        write()
        names.append(fingerprint(w))
    assert w._version == version and len({*names}) == 4


def test_a_cache_sees_every_write(tmp_path):
    """Whoever wrote to a weight by `.data` is not given the old one's decomposition, nor is that kept under its name."""
    torch.manual_seed(0)
    cache, w = SpectralCache(tmp_path), torch.randn(64, 48).bfloat16()
    cache.keep(w)
    before = w.clone()
    w.data[17, 30] += 1
    assert cache.has(before) and not cache.has(w)
    cache.keep(w)
    truth = [torch.linalg.svdvals(t.float()) for t in (before, w)]
    found = [SpectralCache(tmp_path).spectrum(t).sigma for t in (before, w)]
    for sigma, true in zip(found, truth, strict=True):
        torch.testing.assert_close(sigma, true, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(*truth, rtol=1e-3, atol=0)


def test_what_has_no_fingerprint(monkeypatch):
    with pytest.raises(ValueError, match=r"weight has shape \(6,\); wanted"):
        fingerprint(torch.zeros(6))
    monkeypatch.setattr(module, "EXACT", 6)
    with pytest.raises(ValueError, match=r"weight has shape \(2, 7\); no side may be longer than 6"):
        fingerprint(torch.zeros(2, 7))


def test_inference_tensors():
    with torch.inference_mode():
        w = torch.randn(3, 4)
    assert fingerprint(w) == fingerprint(w.clone())
