"""Fingerprints of weights: the same in every layout and on every device, and computed once."""

from __future__ import annotations

import gc
import itertools
import threading

import loradash
import pytest
import torch
from loradash import DashConfig, SpectralCache, apply_dash, prelaunch
from loradash import fingerprint as module
from loradash.fingerprint import EXACT, KEYS, Fingerprints, fingerprint
from torch import nn

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@pytest.fixture
def computed(monkeypatch):
    """The shapes of all weights whose fingerprints were computed."""
    shapes, real = [], module.fingerprint

    def counted(weight):
        shapes.append(tuple(weight.shape))
        return real(weight)

    monkeypatch.setattr(module, "fingerprint", counted)
    return shapes


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


def test_once_while_nobody_writes(computed):
    known = Fingerprints()
    w = torch.randn(6, 4)
    first = known.of(w)
    assert known.of(w) == known.of(w.detach()) == known.of(nn.Parameter(w)) == first and len(computed) == 1
    w.add_(1)
    assert known.of(w) != first and len(computed) == 2
    # Writes that go past the version counter, as merging adapters do by `weight.data`.
    second = known.of(w)
    w.data.mul_(1.5)
    assert known.of(w) != second and len(computed) == 3


def test_other_views_are_other_weights(computed):
    known = Fingerprints()
    w = torch.randn(6, 6)
    names = {known.of(t) for t in (w, w.t(), w[:3], w[3:], w[:, :3])}
    assert len(names) == 5 and len(computed) == 5


def test_a_weight_in_the_place_of_a_dead_one(computed):
    """The allocator gives the same address again: it is another weight."""
    known = Fingerprints()
    addresses, names = set(), set()
    for i in range(20):
        w = torch.full((64, 64), float(i))
        addresses.add(w.data_ptr())
        names.add(known.of(w))
        del w
        gc.collect()
    assert len(names) == 20 and len(addresses) < 20
    assert len(known._known) < 20


def test_inference_tensors():
    with torch.inference_mode():
        w = torch.randn(3, 4)
    known = Fingerprints()
    assert known.of(w) == known.of(w.clone())
    with pytest.raises(ValueError, match="weight has shape"):
        known.of(torch.zeros(6))


def test_threads_share_one():
    known, w, found = Fingerprints(), torch.randn(40, 50), []
    threads = [threading.Thread(target=lambda: found.append(known.of(w))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {*found} == {fingerprint(w)}


def test_a_whole_run_computes_each_once(computed, tmp_path):
    """The thread beside training and the launch after it ask for the same weights; so does a second cache."""
    torch.manual_seed(0)
    model = apply_dash(nn.Sequential(nn.Linear(48, 64), nn.Linear(64, 8)), DashConfig(r=2, directions=3))
    for layer in loradash.dash_layers(model).values():
        nn.init.normal_(layer.lora_b)
    cache = SpectralCache(tmp_path)
    assert cache.start(model).wait()
    assert sorted(computed) == [(8, 64), (64, 48)]
    prelaunch(model, progress=False, cache=SpectralCache(tmp_path))
    assert sorted(computed) == [(8, 64), (64, 48)]
