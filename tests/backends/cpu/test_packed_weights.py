"""Packed copies of frozen weights: never stale, whatever writes to the weight; kept for memory that lives; shared by
its views. On a CPU whose base product stays in the library nothing is packed, and the results must be the same."""

from __future__ import annotations

import ctypes
import gc
import itertools
import threading

import pytest
import torch
from torch.utils import dlpack

from loradash_kernels import dash_linear
from loradash_kernels.backends import extension
from loradash_kernels.packed_weights import enable_packed_weights, invalidate_packed_weights, packed_weight_bytes
from loradash_kernels.testing import check_error_rule, make_case, run

pytestmark = pytest.mark.skipif(not extension.is_compiled(), reason="the compiled part is missing")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
WORDS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}
fuses = pytest.mark.skipif(
    not (extension.is_compiled() and extension.compiled().min_base_rows(0)),
    reason="no fused fp32 base product on this CPU",
)


@pytest.fixture(autouse=True)
def nothing_packed():
    gc.collect()
    invalidate_packed_weights()
    yield
    enable_packed_weights(True)


def make_weight(n, k, dtype=torch.float32, transposed=False):
    """A frozen (N, K) weight and the parameter that owns its memory, which is (K, N) for a transposed one."""
    owner = torch.randn(k, n) if transposed else torch.randn(n, k)
    owner = torch.nn.Parameter(owner.to(dtype), requires_grad=False)
    return owner, lambda: owner.detach().t() if transposed else owner


class Probe:
    """Reads a weight through the layer, bit for bit: rows of the identity pick its columns forward, and its rows
    backward; every other product is with zero."""

    def __init__(self, n, k, dtype):
        m = max(n, k)
        self.n, self.k = n, k
        self.x, self.dy = torch.eye(m, k, dtype=dtype), torch.eye(m, n, dtype=dtype)
        self.a, self.b = torch.zeros(1, k), torch.zeros(n, 1)

    def forward(self, weight):
        x = self.x.clone().requires_grad_()
        return x, dash_linear(x, weight, lora_a=self.a, lora_b=self.b)

    def backward(self, x, y):
        (dx,) = torch.autograd.grad(y, x, self.dy)
        return dx[: self.n]

    def check(self, weight, write=lambda: None):
        """The weight as the forward pass saw it, and, after a write between the passes, as the backward pass did."""
        x, y = self.forward(weight())
        assert torch.equal(y.detach()[: self.k].t(), weight())
        write()
        assert torch.equal(self.backward(x, y), weight())


def warm(n, k, dtype, transposed=False):
    """A weight whose copies are packed and kept for both passes."""
    owner, weight = make_weight(n, k, dtype, transposed)
    probe = Probe(n, k, dtype)
    for _ in range(3):
        probe.check(weight)
    if extension.compiled().min_base_rows(DTYPES.index(dtype)):
        assert packed_weight_bytes() >= 2 * owner.nbytes
    return owner, weight, probe


def flip(t, i, j):
    """The lowest bit of one element: the smallest change there is."""
    t[i, j] ^= 1


def set_storage(owner):
    owner.data.set_((owner.data + 1).untyped_storage(), 0, owner.shape, owner.stride())


def through_bytes(owner, i, j):
    at = owner.data_ptr() + (i * owner.stride(0) + j * owner.stride(1)) * owner.element_size()
    ctypes.memset(at, 0x3C, owner.element_size())


def storage_bytes(owner, i, j):
    owner.untyped_storage()[(i * owner.stride(0) + j * owner.stride(1)) * owner.element_size()] ^= 4


def swap(t, first, second):
    t[first], t[second] = t[second].clone(), t[first].clone()


def words(owner):
    """The same memory as integers, unknown to autograd's version counter."""
    return owner.data.view(WORDS[owner.dtype])


WRITES = {
    "in place": lambda w, i, j: w.mul_(2),
    "element, .data": lambda w, i, j: w.data[i, j].add_(1),
    "element, numpy": lambda w, i, j: flip(words(w).numpy(), i, j),
    "element, torch.from_dlpack": lambda w, i, j: flip(torch.from_dlpack(words(w)), i, j),
    "element, torch.utils.dlpack": lambda w, i, j: flip(dlpack.from_dlpack(dlpack.to_dlpack(words(w))), i, j),
    "element, its storage": storage_bytes,
    "element, its address": through_bytes,
    "row": lambda w, i, j: w.data[i].normal_(),
    "column": lambda w, i, j: w.data[:, j].normal_(),
    "rows swapped": lambda w, i, j: swap(w.data, i, i - 1),
    "columns swapped": lambda w, i, j: swap(w.data.t(), j, j - 1),
    "rows rotated": lambda w, i, j: w.data.copy_(w.data.roll(1, 0)),
    "sign": lambda w, i, j: w.data[i, j].neg_(),
    "two signs in a column": lambda w, i, j: w.data[i - 1 : i + 1, j].neg_(),
    "all signs": lambda w, i, j: w.data.neg_(),
    "+d and -d": lambda w, i, j: (words(w)[i, j].add_(8), words(w)[i - 1, j].sub_(8)),
    "all memory": lambda w, i, j: w.data.copy_(torch.randn_like(w)),
    "another tensor": lambda w, i, j: setattr(w, "data", w.data * 2),
    "another storage": lambda w, i, j: set_storage(w),
}

# Here autograd refuses the backward pass, or rightly takes the memory it saved.
NOT_BETWEEN_PASSES = [WRITES[name] for name in ("in place", "another tensor", "another storage")]


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES.keys())
def test_a_write_is_seen_by_the_next_call(write, dtype, transposed):
    """Before a forward pass, and between forward and backward."""
    owner, weight, probe = warm(96, 64, dtype, transposed)
    with torch.no_grad():
        write(owner, 41, 23)
    probe.check(weight)
    if write not in NOT_BETWEEN_PASSES:
        probe.check(weight, lambda: write(owner, 7, 62))


@pytest.mark.parametrize("dtype", DTYPES)
def test_two_hundred_single_elements(dtype):
    """The lowest bit of one element anywhere in a weight of many fingerprinted blocks; each in both passes."""
    n, k = 203, 333
    owner, weight, probe = warm(n, k, dtype)
    generator = torch.Generator().manual_seed(1)
    places = torch.stack([torch.randint(n, (200,), generator=generator), torch.randint(k, (200,), generator=generator)])
    for trial, (i, j) in enumerate([*places.t().tolist(), (0, 0), (n - 1, k - 1), (0, k - 1), (n - 1, 0)]):
        flip(words(owner), i, j)
        if trial % 2:
            probe.check(weight)
        else:
            # The backward pass is the first to see this one.
            x, y = probe.forward(weight())
            flip(words(owner), n - 1 - i, j)
            assert torch.equal(probe.backward(x, y), owner)


@pytest.mark.parametrize("size", [2e-6, 1e-5, 1e-4])
def test_merges_of_tiny_updates(size):
    """As adapters are merged: `weight.data += delta`, of which bfloat16 keeps a few elements or none."""
    n, k = 128, 96
    owner, weight, probe = warm(n, k, torch.bfloat16)
    owner.data.mul_(0.02)
    changed = 0
    for _ in range(40):
        before = owner.clone()
        owner.data += (torch.randn(n, k) * size).to(torch.bfloat16)
        changed += not torch.equal(before, owner)
        probe.check(weight)
    assert changed > 0


def test_memory_replaced_at_the_same_address():
    """Another tensor, another storage, the same address, other numbers."""
    probe, memory = Probe(96, 64, torch.float32), torch.randn(96, 64).numpy()
    weight = torch.nn.Parameter(torch.from_numpy(memory), requires_grad=False)
    for _ in range(3):
        probe.check(lambda: weight)
        address = weight.data_ptr()
        memory *= 2
        weight.data = torch.from_numpy(memory)
        assert weight.data_ptr() == address
        probe.check(lambda: weight)


@pytest.mark.parametrize("transposed", [False, True])
def test_slices_of_a_larger_weight(transposed):
    """Rows apart: what lies between them is not the weight's."""
    whole = torch.randn(200, 300)
    whole = whole.t() if transposed else whole
    part = whole[10:106, 30:94]
    probe = Probe(96, 64, torch.float32)
    for i in range(6):
        probe.check(lambda: part)
        whole[10 + 7 * i, 30 + 9 * i] += 1
        whole[:10] = i
        probe.check(lambda: part)


def fingerprint(weight):
    return extension.compiled().fingerprint(weight)


@pytest.mark.parametrize(("n", "k"), [(1, 1), (3, 5), (64, 64), (65, 129), (130, 2048)])
def test_fingerprint_of_every_place(n, k):
    """Equal for equal bytes; different after a change of any one element (of some, where there are many)."""
    weight = torch.randn(n, k)
    expected = fingerprint(weight)
    assert torch.equal(fingerprint(weight.clone()), expected)
    flat = weight.view(torch.int32).view(-1)
    for place in range(0, n * k, 1 if n * k < 5000 else 997):
        flat[place] ^= 1 << place % 32
        assert not torch.equal(fingerprint(weight), expected)
        flat[place] ^= 1 << place % 32
    assert torch.equal(fingerprint(weight), expected)


def test_fingerprint_of_rearranged_zeros_and_ones():
    """Few distinct values: where sums and polynomials of odd multipliers collide."""
    places = itertools.product(range(16), range(16), (1.0, -1.0, -0.0))
    weights = [torch.zeros(16, 16).index_put((torch.tensor(i), torch.tensor(j)), torch.tensor(v)) for i, j, v in places]
    pairs = [a + b for a in weights[::13] for b in weights[::17] if not torch.equal(a, -b)]
    seen = {tuple(w.view(torch.int32).view(-1).tolist()): tuple(fingerprint(w).tolist()) for w in weights + pairs}
    assert len(set(seen.values())) == len(seen)


def test_fingerprint_does_not_depend_on_threads():
    weight, threads = torch.randn(700, 900), torch.get_num_threads()
    try:
        one, two = (torch.set_num_threads(count) or fingerprint(weight) for count in (1, 2))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(one, two)


def forward(x, weight):
    return dash_linear(x, weight, lora_a=torch.zeros(1, weight.shape[1]), lora_b=torch.zeros(weight.shape[0], 1))


@fuses
def test_kept_from_the_second_call_as_long_as_the_memory_lives():
    owner = torch.nn.Parameter(torch.randn(96, 64), requires_grad=False)
    x, expected = torch.randn(128, 64), [0, owner.nbytes, owner.nbytes]
    for size in expected:
        forward(x, owner)
        assert packed_weight_bytes() == size
    view = owner.detach().view(-1)
    del owner
    assert packed_weight_bytes() == expected[-1]
    del view
    assert packed_weight_bytes() == 0


@fuses
def test_views_share_one_copy():
    """Made anew for every call: transposed, detached, a slice of all rows."""
    owner = torch.randn(64, 96)
    x = torch.randn(128, 64)
    for view in (lambda: owner.t(), lambda: owner.detach().t(), lambda: owner.view(64, 96).mT, lambda: owner[:].t()):
        forward(x, view())
    assert packed_weight_bytes() == owner.nbytes


@fuses
def test_casts_are_not_kept():
    """A hundred steps under autocast: nothing is held, in either pass."""
    owner, _ = make_weight(96, 64)
    for _ in range(100):
        x = torch.randn(128, 64, requires_grad=True)
        with torch.autocast("cpu", torch.bfloat16):
            y = forward(x, owner)
        # While autograd keeps the cast for the backward pass.
        assert packed_weight_bytes() == 0
        y.float().sum().backward()
        assert packed_weight_bytes() == 0


@fuses
def test_memory_given_back_and_taken_again_is_not_kept():
    """Sharded training empties the gathered weight's storage after use."""
    owner, x = torch.randn(96, 64), torch.randn(128, 64)
    forward(x, owner), forward(x, owner)
    assert packed_weight_bytes() == owner.nbytes
    owner.untyped_storage().resize_(0)
    assert packed_weight_bytes() == 0


@fuses
def test_invalidate_drops_the_copies_of_one_memory_or_all():
    first, second = (torch.randn(96, 64) for _ in range(2))
    x = torch.randn(128, 64)
    for weight in (first, second, first.view(64, 96)):
        for _ in range(2):
            forward(x if weight.shape[1] == 64 else torch.randn(128, 96), weight)
    assert packed_weight_bytes() == 3 * first.nbytes
    # Any view of the memory names it.
    invalidate_packed_weights(first[3:, 5])
    assert packed_weight_bytes() == second.nbytes
    invalidate_packed_weights()
    assert packed_weight_bytes() == 0
    with pytest.raises(TypeError, match="weight must be a tensor or None, got str"):
        invalidate_packed_weights("q_proj")


@fuses
def test_packing_switched_off():
    enable_packed_weights(False)
    case = make_case(100, 64, 96)
    for _ in range(3):
        check_error_rule(case, run(case))
    assert packed_weight_bytes() == 0


def test_first_and_later_calls_agree_bit_for_bit():
    """Packed for one call, packed to be kept, kept: what is recomputed is what was computed."""
    for rows in (1, 7, 8, 16, 70, 300):
        x, (owner, _) = torch.randn(rows, 64), make_weight(96, 64)
        first, *later = (forward(x, owner) for _ in range(4))
        assert all(torch.equal(first, y) for y in later), rows


def test_threads_share_a_weight():
    """Calls at once on one weight, while another thread drops the copies."""
    owner, _ = make_weight(96, 64)
    x = torch.randn(128, 64)
    expected, wrong = forward(x, owner), []

    def work(drop):
        for _ in range(60):
            invalidate_packed_weights(owner) if drop else None
            y = forward(x, owner)
            if not torch.equal(y, expected):
                wrong.append(y)

    threads = [threading.Thread(target=work, args=(i == 0,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_inference_mode():
    with torch.inference_mode():
        owner, probe = torch.randn(96, 64), Probe(96, 64, torch.float32)
        for _ in range(3):
            y = forward(probe.x, owner)
            assert torch.equal(y[:64].t(), owner)
            owner[5, 5] += 1


def output_and_gradients(tensors, dy):
    leaves = {n: t if n in ("weight", "dash_u", "dash_vt") else t.requires_grad_() for n, t in tensors.items()}
    x, weight, bias, *_ = leaves.values()
    y = dash_linear(x, weight, bias, **{n: leaves[n] for n in list(leaves)[3:]}, backend="cpu")
    return y, *torch.autograd.grad(y, [t for t in leaves.values() if t.requires_grad], dy)


@pytest.mark.parametrize("rows", [3, 80])
@pytest.mark.parametrize("dtype", DTYPES)
def test_negative_bit(dtype, rows):
    """torch._neg_view: the same memory, the other sign, of every operand in turn and of the incoming gradient."""
    case = make_case(rows, 40, 48, dtype=dtype, adapter_dtype=torch.float32)
    expected = output_and_gradients({n: t.clone() for n, t in case.tensors.items()}, case.dy)
    for name in (*case.tensors, "dy"):
        negated = {n: torch._neg_view(-t) if n == name else t.clone() for n, t in case.tensors.items()}
        dy = torch._neg_view(-case.dy) if name == "dy" else case.dy
        assert dy.is_neg() or negated[name].is_neg()
        got = output_and_gradients(negated, dy)
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True)), name
