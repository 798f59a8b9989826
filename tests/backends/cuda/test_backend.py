"""The CUDA backend without a GPU: what it says is missing, what it refuses, when it leaves a call to Triton, its tuner."""

from __future__ import annotations

import warnings
from types import SimpleNamespace

import pytest
import torch

from loradash_kernels import dash_linear, explain_backend, notices, ops
from loradash_kernels.backends import cuda as cuda_backend
from loradash_kernels.backends import extension
from loradash_kernels.backends.triton import backend as triton_backend
from loradash_kernels.backends.triton import tiles

needs_extension = pytest.mark.skipif(extension.missing_reason is not None, reason=str(extension.missing_reason))


class OnCard:
    """As much of a tensor on a card as a choice looks at."""

    device = torch.device("cuda", 0)

    def __init__(self, dtype=torch.bfloat16):
        self.dtype = dtype


@pytest.fixture
def card(monkeypatch):
    """Pretends that there is a card of a given capability, and that both GPU backends can run."""

    def pretend(*capability, shared_limit=None):
        properties = SimpleNamespace(shared_memory_per_block_optin=shared_limit)
        triton_backend.architecture_of.cache_clear()
        triton_backend._shared_limit.cache_clear()
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device=None: properties)
        monkeypatch.setattr(cuda_backend, "missing", lambda: None)
        monkeypatch.setattr(cuda_backend, "_has_code", lambda device: True)
        monkeypatch.setattr(triton_backend, "missing", lambda: None)
        backends = [
            ops.Backend(
                "cuda",
                lambda: None,
                cuda_backend.refuses,
                cuda_backend.forward,
                cuda_backend.backward,
                cuda_backend.yields,
            ),
            ops.Backend(
                "triton", lambda: None, triton_backend.refuses, triton_backend.forward, triton_backend.backward
            ),
        ]
        monkeypatch.setattr(ops, "BACKENDS", (*backends, ops.BACKENDS[-1]))

    yield pretend
    triton_backend.architecture_of.cache_clear()
    triton_backend._shared_limit.cache_clear()


@needs_extension
@pytest.mark.skipif(torch.version.cuda is not None, reason="this PyTorch has CUDA")
def test_says_what_is_missing():
    assert "built without CUDA" in cuda_backend.missing()
    assert "built without CUDA" in explain_backend(torch.zeros(1, 1)).reasons["cuda"]


@needs_extension
def test_refuses(card, monkeypatch):
    card(8, 6)
    assert cuda_backend.refuses(OnCard(), 256) is None
    assert "r + s is 257, the CUDA kernels take at most 256" in cuda_backend.refuses(OnCard(), 257)
    assert "torch.float32, the CUDA kernels take bfloat16 and float16" in cuda_backend.refuses(OnCard(torch.float32))
    assert "x is on cpu" in cuda_backend.refuses(torch.zeros(1, 1))
    monkeypatch.setattr(cuda_backend, "_has_code", lambda device: False)
    assert "not for sm_86 (TORCH_CUDA_ARCH_LIST)" in cuda_backend.refuses(OnCard())
    card(7, 5)
    assert "the card is sm_75" in cuda_backend.refuses(OnCard())


@needs_extension
def test_first_up_to_ada_then_triton(card):
    for capability in ((8, 0), (8, 6), (8, 9)):
        card(*capability)
        assert explain_backend(OnCard()).backend == "cuda"
    card(9, 0)
    choice = explain_backend(OnCard())
    assert choice.backend == "triton" and "wgmma" in choice.reasons["cuda"]
    assert explain_backend(OnCard(), "cuda").backend == "cuda"
    assert explain_backend(OnCard(torch.float32)).backend == "triton"


@needs_extension
def test_newer_cards(card, monkeypatch):
    """A kernel of ours runs on every listed card, and on one that is not listed yet."""
    for capability in ((12, 0), (12, 1), (13, 0)):  # mma.sync on both sides
        card(*capability, shared_limit=99 * 1024)
        assert explain_backend(OnCard()).backend == "cuda"
        assert explain_backend(OnCard(torch.float32)).backend == "triton"
        monkeypatch.setattr(cuda_backend, "_has_code", lambda device: False)
        assert explain_backend(OnCard()).backend == "triton"
    for capability in ((10, 0), (10, 3), (11, 0)):
        card(*capability)
        choice = explain_backend(OnCard())
        assert choice.backend == "triton" and "tcgen05" in choice.reasons["cuda"]


@needs_extension
def test_yields_only_to_one_that_takes_the_call(card, monkeypatch):
    monkeypatch.setattr(triton_backend, "refuses", lambda x, width=0: "no table" if width > 24 else None)
    card(9, 0)
    assert [explain_backend(OnCard(), width=width).backend for width in (24, 25, 257)] == [
        "triton",
        "cuda",
        "reference",
    ]


@pytest.fixture
def unwarned(monkeypatch):
    monkeypatch.setattr(notices, "_given", set())


@needs_extension
def test_reference_on_a_card_is_said_once_for_each_reason(card, unwarned):
    card(7, 5)
    with pytest.warns(UserWarning, match="loradash_kernels: plain PyTorch computes .* on this cuda device") as said:
        assert [ops.pick_backend(OnCard(), 24).name for _ in range(2)] == ["reference"] * 2
    (message,) = (str(w.message) for w in said)
    assert "cuda: the card is sm_75" in message and "triton: sm_75 has no tile table" in message
    with pytest.warns(UserWarning, match="r \\+ s is 300"):
        ops.pick_backend(OnCard(), 300)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ops.pick_backend(OnCard(torch.float64), 24)
        ops.pick_backend(OnCard(), 24, "reference")
        explain_backend(OnCard(), width=299)


def test_broken_compiled_part_is_said_once(monkeypatch, unwarned):
    broken = ops.Backend("cpu", lambda: "undefined symbol", ops._cpu_refuses, ops._cpu_forward, ops._cpu_backward)
    monkeypatch.setattr(ops, "BACKENDS", (broken, ops.BACKENDS[-1]))
    x, a = torch.zeros(2, 4), torch.zeros(1, 4, requires_grad=True)

    def step():
        dash_linear(x, torch.zeros(3, 4), lora_a=a, lora_b=torch.zeros(3, 1)).sum().backward()

    with pytest.warns(UserWarning, match="loradash_kernels: .* on this cpu device.*undefined symbol") as said:
        [step() for _ in range(2)]
    assert len(said) == 1


@needs_extension
def test_guessed_tiles_are_said_once(card, unwarned):
    card(13, 0, shared_limit=99 * 1024)
    with pytest.warns(UserWarning, match="tiles for sm_130 are a guess, those of sm_121") as said:
        assert {triton_backend._target_in_use(OnCard.device).name for _ in range(2)} == {"sm_121"}
    assert len(said) == 1
    card(12, 0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        triton_backend._target_in_use(OnCard.device)


@pytest.mark.parametrize(
    ("architecture", "shared_kb", "expected"),
    [
        ("sm_75", 64, None), ("sm_87", 163, "sm_86"), ("sm_91", 227, "sm_90"), ("sm_101", 227, "sm_100"),
        ("sm_101", 99, "sm_89"), ("sm_101", None, "sm_89"), ("sm_130", 227, "sm_121"), ("sm_130", 64, None),
        ("gfx950", 160, "gfx942"), ("gfx908", 64, None), ("gfx1100", 64, None), ("xe", None, None),
    ],
)  # fmt: skip
def test_unlisted_cards_take_the_nearest_older_table(architecture, shared_kb, expected):
    found = tiles.nearest(architecture, shared_kb and shared_kb * 1024)
    assert (found and found.name) == expected


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LORADASH_CACHE", str(tmp_path))
    cuda_backend.MEASURED.forget()
    yield tmp_path
    cuda_backend.MEASURED.forget()


def scripted(times):
    queue = iter(times)

    def timer(call):
        value = next(queue)
        if isinstance(value, Exception):
            raise value
        return value

    return timer


@needs_extension
def test_tuner_keeps_the_fastest(cache):
    names = cuda_backend.candidates(108, 163 * 1024)
    assert {"128x256", "128x128", "one_launch_128x128"} <= set(names)
    times = [3.0, RuntimeError("does not fit"), 1.0, *[2.0] * len(names)]
    assert cuda_backend.tune("forward", "a card/a shape", names, (), scripted(times)) == names[2]
    cuda_backend.MEASURED.forget()
    assert cuda_backend.MEASURED.known() == {"a card/a shape": names[2]}


@needs_extension
def test_tuner_with_nothing_that_runs(cache):
    with pytest.warns(UserWarning, match="the table decides for a shape"):
        assert (
            cuda_backend.tune("forward", "a shape", ["128x128"], (), scripted([RuntimeError("no")]))
            == cuda_backend.TABLE
        )
    assert cuda_backend.MEASURED.known() == {"a shape": cuda_backend.TABLE}


def test_key_tells_what_matters():
    def key(direction="forward", card="a card", m=100, k=64, n=32, columns=False, absent=None):
        x, weight = torch.empty(m, k), torch.empty(k, n).t() if columns else torch.empty(n, k)
        arguments = [x, weight, torch.empty(4, k), torch.empty(n, 4)]
        if absent is not None:
            arguments[absent] = None
        wanted = tuple(i for i, t in enumerate(arguments) if t is not None)
        return cuda_backend.key(direction, card, x, arguments[1], tuple(arguments), wanted)

    assert key() == key(m=128)
    others = [
        key(direction="backward"),
        key(card="b"),
        key(columns=True),
        key(m=129),
        key(k=72),
        key(absent=1),
        key(absent=3),
    ]
    assert len({key(), *others}) == 8
