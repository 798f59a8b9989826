"""Every wrong argument gets an error that names it."""

from __future__ import annotations

import pytest
import torch

from loradash_kernels import available_backends, dash_linear, explain_backend, low_rank_update
from loradash_kernels.testing import make_case

# A machine with a card may lack it.
pytest.importorskip("hypothesis")
from hypothesis import given, settings
from hypothesis import strategies as st


def call(case, **changes):
    t = {**case.tensors, **changes}
    return dash_linear(t.pop("x"), t.pop("weight"), t.pop("bias"), **t)


WRONG = {
    "x": [
        torch.zeros(4, 9),
        torch.zeros(()),
        torch.zeros(4, 8, dtype=torch.int64),
        torch.zeros(4, 8, dtype=torch.complex64),
    ],
    "weight": [
        torch.zeros(6, 9),
        torch.zeros(8),
        torch.zeros(6, 8, dtype=torch.float64),
        torch.zeros(6, 8).requires_grad_(),
    ],
    "bias": [torch.zeros(5), torch.zeros(6, dtype=torch.bfloat16)],
    "lora_a": [torch.zeros(2, 9), torch.zeros(8), torch.zeros(2, 8, dtype=torch.int32)],
    "lora_b": [torch.zeros(6, 3), torch.zeros(5, 2)],
    "dash_u": [torch.zeros(6, 4), None],
    "dash_vt": [torch.zeros(3, 7), None],
    "dash_sigma": [torch.zeros(2), None, torch.zeros(3, 1)],
}


@pytest.mark.parametrize(("name", "value"), [(n, v) for n, values in WRONG.items() for v in values])
def test_wrong_tensors(name, value):
    with pytest.raises(ValueError, match=rf"\b{name}|weight|dash_") as caught:
        call(make_case(4, 8, 6, 2, 3), **{name: value})
    assert any(word in str(caught.value) for word in ("wanted", "must", "frozen", "together"))


@pytest.mark.parametrize("p", [-0.1, 1.0, 2.0, float("nan")])
def test_wrong_dropout(p):
    with pytest.raises(ValueError, match="dropout_p"):
        call(make_case(4, 8, 6, 2, 3), dropout_p=p)


def test_wrong_backend():
    case = make_case(4, 8, 6)
    with pytest.raises(ValueError, match="backend must be one of"):
        call(case, backend="cudnn")
    if available_backends()["cpu"] is None:
        with pytest.raises(RuntimeError, match=r"cannot run: x is torch\.float64"):
            call(make_case(4, 8, 6, dtype=torch.float64), backend="cpu")


def test_low_rank_update_checks_y():
    case = make_case(4, 8, 6, 2, 3)
    t = {n: v for n, v in case.tensors.items() if n not in ("x", "weight", "bias")}
    with pytest.raises(ValueError, match="y has shape"):
        low_rank_update(torch.zeros(3, 6), case.x, **t)
    with pytest.raises(ValueError, match="y is"):
        low_rank_update(torch.zeros(4, 6, dtype=torch.bfloat16), case.x, **t)
    with pytest.raises(ValueError, match="lora_b"):
        low_rank_update(torch.zeros(4, 7), case.x, **t)


def test_explanations_name_every_other_backend():
    choice = explain_backend(torch.zeros(2, 2, dtype=torch.float64))
    assert choice.backend == "reference"
    assert "float64" in choice.reasons["cpu"] or "compiled part is missing" in choice.reasons["cpu"]
    assert set(choice.reasons) | {choice.backend} == set(available_backends())


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    shape=st.tuples(*[st.integers(0, 9)] * 3),
    r=st.integers(0, 4),
    s=st.integers(0, 4),
    name=st.sampled_from(["x", "weight", "bias", "lora_a", "lora_b", "dash_u", "dash_vt", "dash_sigma"]),
    cut=st.integers(0, 1),
)
def test_one_dimension_off(shape, r, s, name, cut):
    """Changing one size of one tensor is either a consistent problem or a ValueError: never anything else."""
    case = make_case(*shape, r, s)
    tensor = case.tensors[name]
    if tensor is None or cut >= tensor.dim():
        return
    case.tensors[name] = torch.cat((tensor, tensor.narrow(cut, 0, min(1, tensor.shape[cut]))), cut)
    changed = case.tensors[name].shape != tensor.shape
    try:
        y = call(case)
    except ValueError:
        assert changed
    else:
        assert not changed or name == "x"
        assert y.shape == (case.tensors["x"].shape[0], shape[2])
