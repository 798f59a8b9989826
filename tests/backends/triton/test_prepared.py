"""Prepared plans: the launches of a plan that is made anew, nothing stale, nothing held; no kernel runs here."""

from __future__ import annotations

import contextlib
import gc
import importlib.util
import itertools
import os
import subprocess
import sys
import threading
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from support.layouts import slices, transposed

from loradash_kernels.backends import tuning
from loradash_kernels.backends.triton import backend

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed"),
    pytest.mark.skipif(backend.interpreted(), reason="the interpreter launches nothing past Triton"),
]

if importlib.util.find_spec("triton"):
    from support.plans import Compiled, both_calls, check_same_plan, plan_of, prepare, workspace_of

    from loradash_kernels.backends.triton import launcher, prepared
    from loradash_kernels.backends.triton.plan import backward as backward_plan
    from loradash_kernels.backends.triton.problem import KernelLaunch
    from loradash_kernels.backends.triton.strategies import Strategy

ROOT = Path(__file__).parents[3]
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
SIZES = (
    (0, 16, 24, 4, 2),
    (8, 16, 0, 4, 2),
    (40, 64, 96, 8, 4),
    (1, 16, 16, 4, 0),
    (33, 50, 70, 0, 3),
    (300, 64, 640, 16, 8),
    (20, 24, 28, 0, 0),
)
OPTIONS = (
    {},
    {"dropout_p": 0.0, "bias": False},
    {"base": False},
    {"layout": slices},
    {"layout": transposed, "dtype": FP32},
)
KINDS = ("fused", "library", "one_launch", "descriptors")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("options", OPTIONS)
def test_the_launches_of_a_plan_made_anew(size, options, kind):
    if size[4] == 0 and "layout" in options:
        options = {"dtype": FP16}
    for call in both_calls(*size, **options):
        found = prepare(call, "sm_90", Strategy(kind)).bind(call)
        check_same_plan(plan_of(call, "sm_90", Strategy(kind))[1], found, call)
        spans = workspace_of(found, call)
        assert all(end <= start for (_, end), (start, _) in itertools.pairwise(spans)), "pieces overlap"
        # What must be zero is allocated by itself, where the CPU's allocator pleases.
        assert all(start % 256 == 0 for start, _ in spans) or kind == "one_launch"


def test_rounds_and_every_choice_of_gradients(monkeypatch):
    monkeypatch.setattr(backward_plan, "_G_BYTES", 1)
    call = both_calls(40, 64, 1000, 8, 4)[1]
    assert any(launch.kernel.__name__ == "add_parts" for launch in plan_of(call, "sm_80", Strategy())[1])
    for wanted in range(32):
        names = ("dx", "da", "db_lora", "dsigma", "dbias")
        some = call._replace(**{name: None for bit, name in enumerate(names) if wanted & 1 << bit})
        check_same_plan(plan_of(some, "sm_80", None)[1], prepare(some).bind(some), some)


def in_order(launch):
    return [{**launch.args, **launch.constants}[name] for name in launch.kernel.arg_names]


@pytest.mark.parametrize("n", [1, 64, 65, 128, 129, 191, 192, 193, 319, 320, 321, 448, 449, 641])
def test_rounds_over_dy_take_every_column_once(monkeypatch, n):
    call = both_calls(20, 16, n, 4, 2, dtype=FP32)[1]
    count = -(-n // 64)
    for most in range(9):
        monkeypatch.setattr(backward_plan, "_G_BYTES", 4 * 20 * 6 * most)
        launches = plan_of(call, "sm_80", Strategy(), "meta")[1]
        rounds = [launch for launch in launches if launch.kernel.__name__ == "dy_pass"]
        ends = [(launch.args["first_tile"], launch.args["first_tile"] + launch.grid[0]) for launch in rounds]
        assert list(itertools.chain(*(range(*end) for end in ends))) == list(range(count))
        parts = rounds[0].args["g_part"].shape[0]
        # The last round fills every part, that for the sum of the rounds before apart.
        assert parts <= max(2, most) and rounds[-1].grid[0] == parts - (len(rounds) > 1)


@pytest.mark.parametrize("kind", KINDS)
def test_repeats_by_address_what_triton_was_given(launched, monkeypatch, kind):
    zeros, within = [], prepared.Piece.within
    monkeypatch.setattr(prepared.Piece, "within", lambda *args: zeros.append(within(*args)) or zeros[-1])
    for call in both_calls(40, 64, 96, 8, 4):
        plan, addresses = prepare(call, "sm_90", Strategy(kind)), prepared.look(call)[2]
        plan.run(call, addresses)
        kernels = [launch for launch in launched.by_triton if isinstance(launch, KernelLaunch)]
        zeros.clear()
        plan.run(call, addresses)
        assert len(zeros) == (kind == "one_launch" and call.pass_ == "forward")
        assert all(t.data_ptr() in launched.repeated[0] and not t.any() for t in zeros)
        assert len(launched.repeated) == len(kernels) and len(launched.by_triton) == len(plan.steps)
        for launch, (name, *arguments) in zip(kernels, launched.repeated, strict=True):
            assert name == launch.kernel.__name__
            grid = [*launch.grid, 1, 1][:3]
            assert arguments[: launcher.ARGUMENTS] == [*grid, "stream", "function", "metadata", None, None, None]
            for ours, theirs in zip(arguments[launcher.ARGUMENTS :], in_order(launch), strict=True):
                if isinstance(theirs, torch.Tensor):
                    assert isinstance(ours, int)
                    own = {t.data_ptr() for t in call if isinstance(t, torch.Tensor)}
                    assert ours == theirs.data_ptr() or theirs.data_ptr() not in own
                    assert (ours - theirs.data_ptr()) % (16 if kind == "one_launch" else 256) == 0
                elif hasattr(theirs, "block_shape"):
                    assert (ours.shape, ours.strides, ours.block_shape) == (
                        theirs.shape,
                        theirs.strides,
                        theirs.block_shape,
                    )
                    assert ours.base.data_ptr() % 16 == 0
                else:
                    assert ours == theirs
        launched.by_triton.clear(), launched.repeated.clear()
    if kind == "library":
        (x, w, _, y, *forward), (dy, same_w, _, dx, *backward) = launched.products
        assert (forward, backward) == ([True, True], [False, True]) and w is same_w is call.weight
        assert x is call.x and dy is call.dy and dx is call.dx and y.shape == dy.shape
        bare = both_calls(40, 64, 96, 0, 0)[0]
        for _ in range(2):
            backend.forward(bare)
        assert launched.products[-1][:4] == (bare.x, bare.weight, bare.bias, bare.y)


def test_a_cached_plan_takes_the_tensors_of_its_call(launched):
    """Other memory of the same kind: the same plan, the other addresses."""
    one, two = (both_calls(40, 64, 96, 8, 4)[0] for _ in range(2))
    for call in (one, two):
        backend.forward(call)
    assert len(backend.PLANS) == 1
    first = launched.repeated[0]
    assert two.x.data_ptr() in first and one.x.data_ptr() not in first


def moved(t, offset=1):
    """The same values at an address that 16 does not divide."""
    memory = t.new_empty(t.numel() + offset)
    return memory[offset:].view(t.shape).copy_(t)


def test_gradients_without_terms_are_zero_in_every_call(launched, monkeypatch):
    """And no driver is asked for, which the interpreter lacks."""
    monkeypatch.setattr(launcher, "current_stream", None)
    for _ in range(3):
        call = both_calls(0, 16, 24, 4, 2)[1]
        backend.backward(call)
        assert all((grad == 0).all() for grad in (call.da, call.db_lora, call.dsigma, call.dbias))
    assert len(backend.PLANS) == 1


def test_what_makes_another_plan(launched, monkeypatch):
    call, gradients = both_calls(40, 64, 96, 8, 4)
    twice = torch.empty(96, 128, dtype=BF16)
    others = (
        call._replace(x=moved(call.x)),
        call._replace(p=moved(call.p)),
        call._replace(weight=twice[:, :64]),
        call._replace(weight=torch.empty(64, 96, dtype=BF16).t()),
        call._replace(lora_b=call.lora_b.to(BF16)),
        call._replace(scaling=3.0),
        call._replace(threshold=7),
        call._replace(seed=None),
        call._replace(bias=None),
        call._replace(weight=None, bias=None, base=call.y.clone()),
        both_calls(40, 64, 97, 8, 4, bias=False)[0],
        both_calls(41, 64, 96, 8, 4)[0],
        both_calls(40, 64, 96, 8, 0)[0],
        gradients,
        gradients._replace(da=None),
        gradients._replace(da=gradients.da.to(BF16)),
        gradients._replace(dy=gradients.dy.t().contiguous().t()),
    )
    for count, other in enumerate((call, *others), 1):
        for _ in range(2):
            getattr(backend, other.pass_)(other)
        assert len(backend.PLANS) == count
    with tuning.forced("triton", forward=Strategy("fused")):
        backend.forward(call)
    assert len(backend.PLANS) == count + 1
    # And all of it anew on another card, on a second one, and where TF32 is allowed.
    others = (
        (backend, "architecture_of", lambda device: "sm_80"),
        (torch.Tensor, "get_device", lambda t: 1),
        (backend, "_tf32_wanted", lambda x: True),
    )
    for more, other in enumerate(others, count + 2):
        monkeypatch.setattr(*other)
        backend.forward(call)
        assert len(backend.PLANS) == more


def test_tensors_given_twice_are_told_apart(launched):
    """U and A^T may be one tensor in one call and two in the next."""
    call = both_calls(40, 64, 64, 8, 8)[0]
    shared = call._replace(dash_vt=call.lora_a)
    backend.forward(shared)
    apart = shared._replace(dash_vt=call.lora_a.clone())
    backend.forward(apart)
    assert len(backend.PLANS) == 1
    down = launched.repeated[0]
    assert apart.dash_vt.data_ptr() in down and apart.lora_a.data_ptr() in down


def test_what_no_kernel_can_read_is_copied(launched):
    """Vectors with gaps, and tensors whose memory holds other values or that have none."""
    call = both_calls(40, 64, 96, 8, 4)[0]
    strange = {
        "dash_sigma": torch.randn(4, 2)[:, 0],
        "lora_a": torch._neg_view(call.lora_a),
        "lora_b": torch._efficientzerotensor(96, 8),
    }
    for name, value in strange.items():
        given, traits, addresses = prepared.look(call._replace(**{name: value}))
        copied = getattr(given, name)
        assert copied.is_contiguous() and not copied.is_neg() and not copied._is_zerotensor()
        assert torch.equal(copied, value) and copied.data_ptr() in addresses
        assert traits == prepared.look(call)[1]
        backend.PLANS.clear()
        backend.forward(call._replace(**{name: value}))
        assert not launched.by_triton[-3].args[name].is_neg() and launched.by_triton[-3].args[name].data_ptr()
    # A vector of one element has no gap, whatever its stride.
    one = both_calls(8, 16, 16, 4, 1)[0]
    one = one._replace(dash_sigma=torch.ones(1, 3)[:, 0])
    assert prepared.look(one)[0] is one


def test_no_tensor_is_held(launched):
    call = both_calls(40, 64, 96, 8, 4)[0]
    held = [weakref.ref(t.untyped_storage()) for t in call if isinstance(t, torch.Tensor)]
    for _ in range(2):
        backend.forward(call)
    assert len(backend.PLANS) == 1 and launched.repeated
    launched.by_triton.clear(), launched.products.clear()
    del call
    gc.collect()
    assert all(storage() is None for storage in held)


def test_the_cache_keeps_the_last_plans():
    made = []
    cache = prepared.PlanCache(3)
    for key in (1, 2, 3, 1, 4, 1, 3, 2):
        if cache.find(key) is None:
            made.append(cache.keep(key, key))
    assert len(cache) == 3 and made == [1, 2, 3, 4, 2]


def test_the_cache_from_several_threads():
    cache = prepared.PlanCache(2)

    def use():
        for turn in range(2000):
            key = turn % 5
            found = cache.find(key)
            assert (cache.keep(key, key) if found is None else found) == key

    threads = [threading.Thread(target=use) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(cache) == 2


def test_a_launch_that_fails_is_tried_by_triton_again(launched, monkeypatch):
    """Nothing is repeated before every launch of a plan went through once."""
    call, run = both_calls(40, 64, 96, 8, 4)[0], KernelLaunch.run

    def fail(launch):
        raise RuntimeError("out of resource")

    monkeypatch.setattr(KernelLaunch, "run", fail)
    with pytest.raises(RuntimeError, match="out of resource"):
        backend.forward(call)
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        on_card = call._replace(x=SimpleNamespace(is_cuda=True, shape=(40, 64), new_empty=call.x.new_empty))
        with pytest.raises(RuntimeError, match=r"\(40, 64\) within the capture .* loradash.warm_up .*out of resource"):
            prepare(call).run(on_card, [])
    monkeypatch.setattr(KernelLaunch, "run", run)
    backend.forward(call)
    assert len(launched.by_triton) == 3 and not launched.repeated


def test_compiled_kernels_live_as_long_as_their_plan(launched):
    """Triton unloads the code of those that nobody holds, and may drop its own."""
    backend.forward(both_calls(40, 64, 96, 8, 4)[0])
    for count in (2, 0):
        gc.collect()
        assert sum(type(found) is Compiled for found in gc.get_objects()) == count
        backend.PLANS.clear()


def test_every_run_takes_the_stream_that_is_current(launched, monkeypatch):
    streams = iter(("first", "second"))
    monkeypatch.setattr(launcher, "current_stream", lambda device: next(streams))
    call = both_calls(40, 64, 96, 8, 4)[0]
    for _ in range(3):
        backend.forward(call)
    place = 1 + launcher.STREAM
    assert [launch[place] for launch in launched.repeated] == ["first", "first", "second", "second"]
    # Another thread may run the same plan: what is filled in is filled into a copy.
    repeats = next(iter(backend.PLANS._plans.values()))._repeats
    assert all(repeat.template[launcher.STREAM] is None for repeat in repeats if repeat.template)


@pytest.mark.parametrize(("device", "entered"), [(0, []), (1, [torch.device("cuda", 1)])])
def test_the_device_of_x_is_the_current_one(monkeypatch, device, entered):
    seen = []

    @contextlib.contextmanager
    def enter(found):
        seen.append(found)
        yield

    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device", enter)
    monkeypatch.setattr(backend, "_run_here", lambda call: None)
    x = SimpleNamespace(is_cuda=True, get_device=lambda: device, device=torch.device("cuda", device))
    backend.forward(SimpleNamespace(x=x))
    assert seen == entered


@pytest.mark.slow
def test_host_time_runs():
    command = [sys.executable, "-m", "benchmarks.layers.host_time", "--blocks", "1", "--steps", "2"]
    done = subprocess.run(command, env=dict(os.environ), capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "the library's products left out" in done.stdout
