"""A pretended card of every capability: which backend, and the warning where it is the reference."""

from __future__ import annotations

import pytest
import torch
from support.choices import CAPABILITIES, TRITONS, choice, pretended

from loradash_kernels import available_backends
from loradash_kernels.backends import cards
from loradash_kernels.backends.triton import backend as triton
from loradash_kernels.backends.triton.tiles import TARGETS


def oldest_triton(capability):
    """Which compiles for such a card."""
    return {(10, 3): "3.6", (11, 0): "3.7", (12, 1): "3.6", (13, 0): "3.6"}.get(capability, "3.3")


def expected(capability, code, version, dtype=torch.bfloat16):
    if capability < (8, 0):
        return "reference"
    if code and dtype != torch.float32:
        return "cuda"
    return (
        "triton" if version == "3.8.0" or (version == "3.3.1" and oldest_triton(capability) == "3.3") else "reference"
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("version", TRITONS)
@pytest.mark.parametrize("code", [True, False])
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_every_card(capability, code, version, dtype):
    name, warning = choice(capability, code, version, dtype)
    assert name == expected(capability, code, version, dtype)
    assert (warning is not None) == (name == "reference")
    if warning is None:
        return
    assert "plain PyTorch computes LoRA-Dash layers on this cuda device, slowly" in warning
    if capability < (8, 0):
        assert "No kernel runs on sm_75: sm_80 or newer is needed" in warning
    else:
        oldest = oldest_triton(capability)
        assert f"Install Triton {oldest} or newer (`pip install 'triton>={oldest}'`)" in warning
        toolkit = f"CUDA toolkit for sm_{capability[0]}{capability[1]}"
        assert (toolkit in warning) == (dtype != torch.float32), "the compiled part takes no float32"
        why = {
            "3.3.1": "Triton 3.3 does not compile for",
            "3.2.0": "Triton 3.2.0 is too old",
            None: "Triton is not installed",
        }
        assert why[version] in warning


@pytest.mark.parametrize("hip", ["6.4", None])
def test_no_remedy_where_there_is_none(monkeypatch, hip):
    """A Triton that is there is not asked for, and where nothing helps no sentence ends in the air."""
    monkeypatch.setattr(triton, "target_of", lambda device: None)
    monkeypatch.setattr(torch.version, "hip", hip)
    for module in (cards, triton):
        monkeypatch.setattr(module, "architecture_of", lambda device: "gfx906" if hip else "sm_99")
    name, warning = choice((9, 0), code=False)
    assert name == "reference" and "Install Triton" not in warning
    assert warning.endswith("(docs/install.md)" if hip is None else f"known are {', '.join(TARGETS)}")


@pytest.mark.parametrize("code", [True, False])
def test_too_wide_for_any_kernel(code):
    name, warning = choice((9, 0), code, width=257)
    assert name == "reference" and "No kernel takes r + s above 256: choose a smaller rank" in warning


def test_float64_is_the_reference_without_a_warning():
    assert choice((9, 0), dtype=torch.float64) == ("reference", None)


def test_what_is_available():
    with pretended((8, 0), triton_version="3.2.0"):
        found = available_backends()
    assert found["cuda"] is None and "3.2.0 is too old" in found["triton"] and found["reference"] is None
