"""The CUDA backend without a GPU: what it says is missing, what it refuses, which tiles it has to choose from."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from support.cards import OnCard, backward_call, forward_call

from loradash_kernels import explain_backend
from loradash_kernels.backends import cuda, extension, tuning

pytestmark = pytest.mark.skipif(extension.missing_reason is not None, reason=str(extension.missing_reason))


@pytest.mark.skipif(torch.version.cuda is not None, reason="this PyTorch has CUDA")
def test_says_what_is_missing():
    assert "built without CUDA" in cuda.missing()
    assert "built without CUDA" in explain_backend(torch.zeros(1, 1)).reasons["cuda"]


def test_a_part_of_an_older_version_is_to_be_rebuilt(monkeypatch):
    """It has the operators, and no sentence of why it has none for CUDA."""
    monkeypatch.setattr(extension, "compiled", lambda: SimpleNamespace(cuda_architectures=None))
    said = cuda.missing.__wrapped__()
    assert "it is older than this package; rebuild it with `pip install" in said


def test_refuses(card, monkeypatch):
    card(8, 6)
    assert cuda.refuses(OnCard(), 256) is None
    assert "r + s is 257, the CUDA kernels take at most 256" in cuda.refuses(OnCard(), 257)
    assert "torch.float32, the CUDA kernels take bfloat16 and float16" in cuda.refuses(OnCard(torch.float32))
    assert "x is on cpu" in cuda.refuses(torch.zeros(1, 1))
    monkeypatch.setattr(cuda, "_has_code", lambda device: False)
    assert "not for sm_86 (TORCH_CUDA_ARCH_LIST)" in cuda.refuses(OnCard())
    card(7, 5)
    assert "the card is sm_75" in cuda.refuses(OnCard())


def test_a_card_that_cannot_be_asked_is_asked_again(monkeypatch):
    """An error of CUDA's is no answer: it is raised, and not remembered as a card without code."""
    answers = iter([RuntimeError("loradash: out of memory"), True])

    def runs_on(index):
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(extension.compiled(), "cuda_runs_on", runs_on, raising=False)
    cuda._has_code.cache_clear()
    with pytest.raises(RuntimeError, match="out of memory"):
        cuda._has_code(OnCard.device)
    assert cuda._has_code(OnCard.device)
    cuda._has_code.cache_clear()


def test_tiles_to_choose_from():
    assert {"128x256", "128x128", "one_launch_128x128"} <= set(extension.compiled().cuda_tiles((108, 163 * 1024)))


@pytest.mark.parametrize("make", [forward_call, backward_call])
def test_an_explicit_backend_runs_its_own_kernels(card, cache, monkeypatch, make):
    """Whatever was measured about backends, a call that reached this one takes a strategy of its own: the measured one, or
    the library's product."""
    card(8, 6)
    ran, call = [], make(OnCard())
    monkeypatch.setattr(cuda, "_run", lambda call, tile: ran.append(tile))
    monkeypatch.setattr(extension.compiled(), "cuda_card", lambda index: (82, 99 * 1024), raising=False)
    tuning.MEASURED.remember(tuning.key("backend", call), "triton")
    getattr(cuda, call.pass_)(call)
    tuning.MEASURED.remember(tuning.key("cuda", call), "128x128")
    getattr(cuda, call.pass_)(call)
    assert ran == ["library", "128x128"]
