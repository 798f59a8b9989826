"""Batches of pre-launch: as many layers as a card's memory holds, and fewer where it turns out to hold less."""

from __future__ import annotations

import loradash
import pytest
import torch
from loradash import DashConfig, apply_dash, batches, prelaunch
from loradash.batches import COPIES, batch_elements, is_out_of_memory
from torch import nn

SIDE, LAYERS = 40, 7
NAMES = prelaunch.__globals__


@pytest.fixture
def card(monkeypatch):
    """Sets a pretended card's memory: free on the card, reserved by PyTorch's allocator, allocated in it."""

    def memory(free, reserved=0, allocated=0):
        monkeypatch.setattr("torch.cuda.mem_get_info", lambda device: (free, 80 * 2**30))
        monkeypatch.setattr("torch.cuda.memory_reserved", lambda device: reserved)
        monkeypatch.setattr("torch.cuda.memory_allocated", lambda device: allocated)

    return memory


def test_cached_blocks_count_as_free(card):
    card(free=2**30)
    assert batch_elements("cuda") == 2**30 // (4 * COPIES)
    # What PyTorch keeps for reuse is free to the next allocation, what tensors lie in is not.
    card(free=2**30, reserved=5 * 2**30, allocated=2 * 2**30)
    assert batch_elements("cuda:1") == 4 * 2**30 // (4 * COPIES)
    card(free=0)
    assert batch_elements("cuda") == 1
    assert batch_elements("cpu") == batches.BATCH_ELEMENTS


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), True),
        (RuntimeError("cusolver error: CUSOLVER_STATUS_ALLOC_FAILED, when calling `cusolverDnCreate(handle)`"), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_errors_of_memory(error, expected):
    assert is_out_of_memory(error) is expected


def adapted(layers=LAYERS):
    torch.manual_seed(0)
    model = apply_dash(nn.Sequential(*[nn.Linear(SIDE, SIDE) for _ in range(layers)]), DashConfig(r=2, directions=3))
    for layer in loradash.dash_layers(model).values():
        nn.init.normal_(layer.lora_b)
    return model


@pytest.fixture
def bounded(monkeypatch):
    """Call it with the number of layers that memory holds. It returns the list of batch sizes that are tried."""
    real = NAMES["task_specific_directions"]

    def bound(most, error=torch.OutOfMemoryError):
        tried = []

        def directions(weight, *args, **options):
            tried.append(weight.shape[0])
            if weight.shape[0] > most:
                raise error("CUDA out of memory. Tried to allocate 2.00 GiB")
            return real(weight, *args, **options)

        monkeypatch.setitem(NAMES, "task_specific_directions", directions)
        return tried

    return bound


@pytest.mark.parametrize("method", ["auto", "exact"])
@pytest.mark.parametrize("most", [1, 2, 3, 6])
def test_halved_batches_find_the_same(bounded, most, method):
    """No bit depends on the batch here; a library that sums otherwise for another batch would be allowed its rounding."""
    whole, halved = adapted(), adapted()
    for model in (whole, halved):
        object.__setattr__(loradash.dash_state(model).config, "svd", method)
    expected = prelaunch(whole, progress=False)
    tried = bounded(most)
    found = prelaunch(halved, progress=False)
    assert tried[0] == LAYERS and sum(size for size in tried if size <= most) == LAYERS
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.name == theirs.name and ours.route == theirs.route and torch.equal(ours.index, theirs.index)
        torch.testing.assert_close(ours.sigma, theirs.sigma)
    for ours, theirs in zip(halved, whole, strict=True):
        torch.testing.assert_close(ours.dash_u, theirs.dash_u, rtol=0, atol=1e-4)
        torch.testing.assert_close(ours.dash_vt, theirs.dash_vt, rtol=0, atol=1e-4)


def test_what_was_too_large_is_not_tried_again(bounded, monkeypatch):
    """Batches after the one that failed are no larger than what it was halved to."""
    monkeypatch.setattr(batches, "BATCH_ELEMENTS", 4 * SIDE * SIDE)
    tried = bounded(2)
    prelaunch(adapted(10), progress=False)
    assert tried == [4, 2, 2, 2, 2, 2]


def test_memory_is_given_back_before_the_halves(bounded, monkeypatch):
    """The failed attempt's tensors are gone by then: no traceback holds them."""
    released = []
    monkeypatch.setitem(NAMES, "release", lambda device: released.append(str(device)))
    bounded(2)
    prelaunch(adapted(4), progress=False)
    assert released == ["cpu"]
    emptied = []
    monkeypatch.setattr("torch.cuda.empty_cache", lambda: emptied.append(1))
    batches.release("cuda:0")
    batches.release("cpu")
    assert emptied == [1]


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, RuntimeError])
def test_one_layer_that_is_too_large_is_named(bounded, error):
    """And nothing was written, though others were found before."""
    model = adapted()
    bounded(0, error)
    with pytest.raises(
        torch.OutOfMemoryError, match=rf"^0: its weight \({SIDE}, {SIDE}\) alone .* on cpu.*51,200 bytes"
    ):
        prelaunch(model, progress=False)
    assert not any(layer.launched for layer in model)


def test_one_layer_is_tried_again_without_unused_blocks(monkeypatch):
    """A library's workspace is no block of PyTorch's allocator, which then keeps what the library lacks."""
    released, real = [], NAMES["task_specific_directions"]

    def directions(*args, **options):
        if not released:
            raise RuntimeError("cusolver error: CUSOLVER_STATUS_ALLOC_FAILED, when calling `cusolverDnCreate(handle)`")
        return real(*args, **options)

    monkeypatch.setitem(NAMES, "task_specific_directions", directions)
    monkeypatch.setitem(NAMES, "release", released.append)
    model = adapted(1)
    assert len(prelaunch(model, progress=False)) == 1 and len(released) == 1


def test_the_message_tells_what_is_free_on_a_card(card):
    card(free=1000, reserved=500, allocated=200)
    text = str(batches.no_memory("block.7", 4096, 11008, torch.device("cuda", 1)))
    assert "block.7: its weight (4096, 11008)" in text and "cuda:1" in text and "of which 1,300 are free" in text


def test_a_share_is_given_up_where_another_process_failed(bounded, monkeypatch):
    """What is left of it would be for nothing: the next batch is not begun."""
    tried = bounded(LAYERS)

    class Lost:
        def __init__(self, rank, processes, what, bar, group):
            assert (rank, processes) == (0, 2)

        def is_lost(self):
            return len(tried) == 2

        def advance(self, steps):
            pass

        def meet(self, error=None):
            raise RuntimeError("process 1 failed")

    monkeypatch.setattr(batches, "BATCH_ELEMENTS", SIDE * SIDE)
    monkeypatch.setitem(NAMES, "place", lambda group: (0, 2))
    monkeypatch.setitem(NAMES, "check_same_layers", lambda shapes, group: None)
    monkeypatch.setitem(NAMES, "Meeting", Lost)
    with pytest.raises(RuntimeError, match="process 1 failed"):
        prelaunch(adapted(10), progress=False)
    assert tried == [1, 1]


def test_other_errors_are_not_tried_again(monkeypatch):
    def broken(*args, **options):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setitem(NAMES, "task_specific_directions", broken)
    with pytest.raises(RuntimeError, match="illegal"):
        prelaunch(adapted(), progress=False)


def test_weights_are_decomposed_in_float32_whatever_the_default_is(monkeypatch):
    seen, real = [], NAMES["task_specific_directions"]

    def directions(weight, a, b, *args, **options):
        seen.append({weight.dtype, a.dtype, b.dtype})
        return real(weight, a, b, *args, **options)

    monkeypatch.setitem(NAMES, "task_specific_directions", directions)
    model = adapted(2)
    torch.set_default_dtype(torch.bfloat16)
    try:
        prelaunch(model, progress=False)
    finally:
        torch.set_default_dtype(torch.float32)
    assert seen == [{torch.float32}]
