"""Which backend a call takes, on machines and cards that are pretended."""

from __future__ import annotations

import warnings
from types import SimpleNamespace

import pytest
import torch
from support.cards import OnCard, backward_call, forward_call
from support.stopwatch import Scripted

from loradash_kernels import dash_linear, explain_backend, timing
from loradash_kernels.backends import cpu, cuda, extension, registry, tuning
from loradash_kernels.backends.triton import backend as triton

needs_extension = pytest.mark.skipif(extension.missing_reason is not None, reason=str(extension.missing_reason))


@needs_extension
def test_cuda_comes_first_wherever_it_has_code(card, cache, monkeypatch):
    for capability in ((8, 0), (8, 9), (9, 0), (10, 0), (12, 0), (13, 0)):
        card(*capability, shared_limit=99 * 1024)
        assert explain_backend(OnCard()).backend == "cuda"
        assert explain_backend(OnCard(torch.float32)).backend == "triton"
        with monkeypatch.context() as other:
            other.setattr(cuda, "_has_code", lambda device: False)
            choice = explain_backend(OnCard())
            assert choice.backend == "triton" and "TORCH_CUDA_ARCH_LIST" in choice.reasons["cuda"]
    assert explain_backend(OnCard(), "triton").reasons["cuda"] == "triton was asked for"


@needs_extension
def test_says_why_the_library_is_the_default(card, cache):
    card(9, 0)
    text = str(explain_backend(OnCard()))
    assert "cuda: runs; the vendor's base product" in text and "no measurement of this card (a card)" in text
    assert "triton: cuda comes first" in text
    tuning.MEASURED.remember(tuning.key("cuda", forward_call(OnCard())), "128x128")
    assert "a fused tile where one was measured to be faster" in explain_backend(OnCard()).how
    assert "1 of this machine" in explain_backend(OnCard()).how
    assert "no measurement" in explain_backend(OnCard(), "triton").how
    assert explain_backend(OnCard(), "reference").how == "" == explain_backend(torch.zeros(1, 1)).how


@needs_extension
def test_triton_takes_what_cuda_does_not(card, monkeypatch):
    card(9, 0)
    monkeypatch.setattr(cuda, "_max_width", lambda: 24)
    found = [explain_backend(OnCard(), width=width).backend for width in (24, 25, 257)]
    assert found == ["cuda", "triton", "reference"]


@needs_extension
def test_choosing_compiles_nothing(card, cache, monkeypatch):
    """And asks the driver for a card's capability once."""
    triton_package = pytest.importorskip("triton")

    def compiles(*args, **kwargs):
        raise AssertionError("something is compiled")

    card(9, 0)
    asked = []
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: asked.append(device) or (9, 0))
    monkeypatch.setattr(triton_package, "compile", compiles)
    monkeypatch.setattr(triton_package.runtime.jit.JITFunction, "run", compiles)
    monkeypatch.setattr(torch, "compile", compiles)
    monkeypatch.setattr(torch.cuda.jiterator, "_create_jit_fn", compiles)
    for x in (OnCard(), OnCard(torch.float32), OnCard(torch.float64)):
        for make in (forward_call, backward_call):
            [registry.pick(make(x)) for _ in range(2)]
            explain_backend(x)
    assert len(asked) <= 2, "once by these kernels, once by Triton's"


@needs_extension
def test_reference_on_a_card_is_said_once_for_each_reason(card, unwarned):
    card(7, 5)
    with pytest.warns(UserWarning, match="loradash_kernels: plain PyTorch computes .* on this cuda device") as said:
        assert [registry.pick(forward_call(OnCard())).name for _ in range(2)] == ["reference"] * 2
    (message,) = (str(w.message) for w in said)
    assert "cuda: the card is sm_75" in message and "triton: sm_75 has no tile table" in message
    with pytest.warns(UserWarning, match="r \\+ s is 300"):
        registry.pick(forward_call(OnCard(), 300))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        registry.pick(forward_call(OnCard(torch.float64)))
        registry.pick(forward_call(OnCard()), "reference")
        explain_backend(OnCard(), width=299)


def test_broken_compiled_part_is_said_once(monkeypatch, unwarned):
    monkeypatch.setattr(cpu, "missing", lambda: "undefined symbol")
    x, a = torch.zeros(2, 4), torch.zeros(1, 4, requires_grad=True)

    def step():
        dash_linear(x, torch.zeros(3, 4), lora_a=a, lora_b=torch.zeros(3, 1)).sum().backward()

    with pytest.warns(UserWarning, match="loradash_kernels: .* on this cpu device.*undefined symbol") as said:
        [step() for _ in range(2)]
    assert len(said) == 1


def test_a_backend_is_a_module_of_one_shape():
    for backend in registry.BACKENDS:
        assert isinstance(backend.name, str)
        assert all(callable(getattr(backend, part)) for part in ("missing", "refuses", "forward", "backward"))
    assert len({backend.name for backend in registry.BACKENDS}) == len(registry.BACKENDS)


def test_a_toy_backend(monkeypatch):
    """A place in BACKENDS is all that a new one needs."""
    seen = []
    toy = SimpleNamespace(
        name="toy",
        missing=lambda: None,
        refuses=lambda x, width=0: None if x.dtype == torch.float64 else "x is not float64",
        forward=lambda call: (seen.append(call.pass_), call.y.zero_(), call.p.zero_()),
        backward=lambda call: (seen.append(call.pass_), call.da.fill_(7.0)),
    )
    monkeypatch.setattr(registry, "BACKENDS", (toy, *registry.BACKENDS))
    x, w, b = (torch.randn(*shape, dtype=torch.float64) for shape in ((2, 4), (3, 4), (3, 1)))
    a = torch.randn(1, 4, dtype=torch.float64, requires_grad=True)
    dash_linear(x, w, lora_a=a, lora_b=b).sum().backward()
    assert seen == ["forward", "backward"] and torch.equal(a.grad, torch.full_like(a, 7.0))
    assert explain_backend(x).backend == "toy"
    with pytest.raises(RuntimeError, match="backend='toy' cannot run: x is not float64"):
        dash_linear(x.float(), w.float(), lora_a=a, lora_b=b, backend="toy")


@needs_extension
@pytest.mark.parametrize("make", [forward_call, backward_call])
def test_a_measured_backend_is_taken_where_none_was_asked_for(card, cache, make):
    card(8, 6)
    call, other = make(OnCard()), make(OnCard(shape=(9, 16)))
    assert registry.pick(call).name == "cuda"
    tuning.MEASURED.remember(tuning.key("backend", call), "triton")
    assert registry.pick(call).name == "triton"
    assert registry.pick(call, "cuda").name == "cuda"
    assert registry.pick(call, "reference").name == "reference"
    assert registry.pick(other).name == "cuda"


@needs_extension
def test_a_measured_backend_that_is_gone(card, cache, monkeypatch):
    card(8, 6)
    call = forward_call(OnCard())
    tuning.MEASURED.remember(tuning.key("backend", call), "triton")
    monkeypatch.setattr(triton, "missing", lambda: "Triton is not installed")
    assert registry.pick(call).name == "cuda"


@needs_extension
def test_measures_the_backends_that_take_the_call(card, cache, monkeypatch):
    """Once, the reference and whatever refuses left out; an explicit backend is not measured against others."""
    card(8, 6)
    clock = Scripted(cuda=2.0, triton=1.0)
    monkeypatch.setattr(timing, "stopwatch_for", lambda device: clock)
    monkeypatch.setattr(cuda, "forward", lambda call: clock.run("cuda"))
    monkeypatch.setattr(triton, "forward", lambda call: clock.run("triton"))
    monkeypatch.setenv("LORADASH_TUNE", "1")
    call = forward_call(OnCard())
    assert registry.pick(call, "cuda").name == "cuda" and clock.events == []
    assert registry.pick(call).name == "triton" and {"cuda", "triton"} < set(clock.events)
    ran = len(clock.events)
    assert registry.pick(call).name == "triton"
    assert registry.pick(forward_call(OnCard(torch.float32))).name == "triton"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert registry.pick(forward_call(OnCard(torch.float64))).name == "reference"
    assert len(clock.events) == ran
