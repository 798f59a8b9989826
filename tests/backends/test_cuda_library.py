"""The CUDA backend's default: the vendor's base product, summed onto what the low-rank kernels wrote.

The product is PyTorch's own, on the CPU; the kernels are the reference in their place, and for some shapes the real ones in
the emulator.
"""

from __future__ import annotations

import pytest
import torch
from support import cuda_emulation as emulation
from support.calls import calls, drawn_seed, outputs, results
from support.cards import OnCard, backward_call, forward_call
from support.layouts import slices, transposed
from support.shapes import SHAPES

from loradash_kernels.backends import cuda, extension, reference, tuning
from loradash_kernels.calls import BackwardCall, ForwardCall
from loradash_kernels.testing import check_error_rule, make_case

needs_extension = pytest.mark.skipif(extension.missing_reason is not None, reason=str(extension.missing_reason))
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


class Doubles:
    """The compiled operators, computed by the reference; what each was asked is kept."""

    def __init__(self):
        self.asked = []

    def __call__(self, pass_):
        return {"forward": self.forward, "backward": self.backward}[pass_]

    def forward(self, *arguments):
        call = self._note(ForwardCall, arguments)
        if call.weight is None and call.base is None:
            base = torch.zeros_like(call.y) if call.bias is None else call.bias.expand_as(call.y)
            call = call._replace(base=base, bias=None)
        # Compiled operators have no gradients.
        with torch.no_grad():
            reference.forward(call)

    def backward(self, *arguments):
        reference.backward(self._note(BackwardCall, arguments))

    def _note(self, kind, arguments):
        *fields, tile = arguments
        call = kind(*fields)
        self.asked.append((call.pass_, call.weight is not None, tile))
        return call


class Emulated(Doubles):
    """The compiled operators in the emulator."""

    def forward(self, *arguments):
        self._run(extension.compiled().cuda_plan_forward, self._note(ForwardCall, arguments), arguments[-1])

    def backward(self, *arguments):
        self._run(extension.compiled().cuda_plan_backward, self._note(BackwardCall, arguments), arguments[-1])

    def _run(self, plan, call, tile):
        launches, kept = plan(*call, emulation.CARDS["sm_80"], tile)
        emulation.emulate(launches, [t for t in (*call, *kept) if isinstance(t, torch.Tensor)], "sm_80")


@pytest.fixture
def doubles(cache, monkeypatch):
    found = Doubles()
    monkeypatch.setattr(cuda, "_kernels", found)
    return found


def library_run(case):
    """Output and gradients by the backend's own strategy, from outputs of NaN."""
    out = outputs(case)
    forward, backward = calls(case, out, drawn_seed(case))
    cuda.forward(forward)
    cuda.backward(backward)
    return results(case, out, base=True)


WITHOUT_WEIGHT = [("forward", False, ""), ("backward", False, "")]


@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("shape", SHAPES)
def test_shapes(doubles, shape, dtype):
    case = make_case(*shape, dtype, adapter_dtype=FP32, dropout_p=0.1)
    check_error_rule(case, library_run(case))
    assert doubles.asked == WITHOUT_WEIGHT


@pytest.mark.parametrize("layout", [slices, transposed])
@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_layouts(doubles, layout, dtype):
    case = make_case(70, 96, 80, 8, 4, dtype, adapter_dtype=FP32, dropout_p=0.1)
    layout(case)
    check_error_rule(case, library_run(case))


@pytest.mark.parametrize("options", [{"bias": False}, {"dropout_p": 0.0}, {"dropout_p": 0.9}, {"scaling": 0.0}])
def test_options(doubles, options):
    case = make_case(70, 80, 96, 8, 4, BF16, adapter_dtype=FP32, **options)
    check_error_rule(case, library_run(case))


@pytest.mark.parametrize(("r", "s"), [(0, 0), (0, 4), (4, 0), (40, 8)])
def test_ranks(doubles, r, s):
    case = make_case(33, 40, 24, r, s, BF16, adapter_dtype=FP32, dropout_p=0.1)
    check_error_rule(case, library_run(case))


@pytest.mark.parametrize("shape", [(0, 8, 8), (5, 0, 8), (5, 8, 0), (0, 0, 0)])
def test_empty(doubles, shape):
    case = make_case(*shape, 2, 1, BF16, adapter_dtype=FP32)
    check_error_rule(case, library_run(case))


def test_small_terms_on_a_large_bias(doubles):
    """Bias and low-rank terms are rounded before the base product joins them."""
    case = make_case(200, 64, 96, 4, 3, BF16, adapter_dtype=FP32)
    case.tensors["bias"] *= 64
    case.tensors["lora_b"] *= 2**-10
    case.tensors["dash_sigma"] *= 2**-10
    check_error_rule(case, library_run(case))


@pytest.mark.parametrize("wanted", ["lora_a", "lora_b", "dash_sigma", "bias"])
def test_no_product_where_no_dx_is_wanted(doubles, monkeypatch, wanted):
    """One gradient alone is written as among all; W is not even read."""
    case = make_case(40, 32, 48, 4, 2, BF16, adapter_dtype=FP32, dropout_p=0.1)
    full, out = outputs(case), outputs(case)
    forward, backward = calls(case, full, drawn_seed(case))
    for run, call in ((cuda.forward, forward), (cuda.backward, backward)):
        run(call)
    fields = {"lora_a": "da", "lora_b": "db_lora", "dash_sigma": "dsigma", "bias": "dbias"}
    grads = {field: out[name] if name == wanted else None for name, field in fields.items()}
    backward = backward._replace(dx=None, **grads)
    monkeypatch.setattr(torch.Tensor, "addmm_", None)
    cuda.backward(backward)
    assert torch.equal(out[wanted], full[wanted])


def test_low_rank_update_has_no_product(doubles, monkeypatch):
    case = make_case(40, 32, 48, 4, 2, BF16, adapter_dtype=FP32)
    out = outputs(case, base=False)
    forward, backward = calls(case, out, drawn_seed(case), torch.nn.functional.linear(case.x, case.tensors["weight"]))
    monkeypatch.setattr(torch.Tensor, "addmm_", None)
    cuda.forward(forward)
    cuda.backward(backward)
    assert doubles.asked == WITHOUT_WEIGHT and not out["y"].isnan().any() and not out["x"].isnan().any()


def test_x_that_is_the_weight(doubles):
    """The field is left out, not what equals it."""
    case = make_case(32, 32, 32, 4, 2, BF16, adapter_dtype=FP32)
    case.tensors["x"] = case.tensors["weight"]
    check_error_rule(case, library_run(case))


def test_nothing_is_saved_or_cast(doubles):
    """Where gradients are recorded and under autocast: y stays a result of the kernels, in its own dtype."""
    case = make_case(8, 16, 24, 4, 2, BF16, adapter_dtype=FP32)
    out = outputs(case)
    forward, _ = calls(case, out, drawn_seed(case))
    with torch.autocast("cpu", torch.float16):
        cuda.forward(forward._replace(x=forward.x.clone().requires_grad_()))
    assert out["y"].dtype == BF16 and not out["y"].requires_grad
    assert torch.equal(out["y"], library_run(case)["y"])


@needs_extension
def test_each_strategy_can_be_forced_and_measured(doubles, monkeypatch):
    monkeypatch.setattr(extension.compiled(), "cuda_card", lambda index: (82, 99 * 1024), raising=False)
    case = make_case(64, 64, 64, 4, 2, BF16, adapter_dtype=FP32)
    forward, backward = calls(case, outputs(case), drawn_seed(case))
    for strategy, weight, tile in (("library", False, ""), ("fused", True, ""), ("64x128", True, "64x128")):
        doubles.asked.clear()
        with tuning.forced("cuda", forward=strategy, backward=strategy):
            cuda.forward(forward), cuda.backward(backward)
        assert doubles.asked == [("forward", weight, tile), ("backward", weight, tile)]
    doubles.asked.clear()
    tuning.MEASURED.remember(tuning.key("cuda", forward), "128x128")
    cuda.forward(forward), cuda.backward(backward)
    assert doubles.asked == [("forward", True, "128x128"), ("backward", False, "")]


@needs_extension
@pytest.mark.parametrize("make", [forward_call, backward_call])
def test_candidates(monkeypatch, make):
    """The library beside every tile, where there is a product that it could do."""
    monkeypatch.setattr(extension.compiled(), "cuda_card", lambda index: (82, 99 * 1024), raising=False)
    tiles, call = extension.compiled().cuda_tiles((82, 99 * 1024)), make(OnCard())
    if make is backward_call:
        assert cuda.candidates(call) == tiles, "no dx is wanted"
        call = call._replace(dx=torch.empty(8, 16))
    assert cuda.candidates(call) == ["library", *tiles]
    assert cuda.candidates(call._replace(weight=None)) == tiles


@pytest.mark.emulated
@pytest.mark.skipif(emulation.missing_tools() is not None, reason=str(emulation.missing_tools()))
@pytest.mark.parametrize(
    ("shape", "columns"), [((100, 96, 136, 16, 8), False), ((37, 56, 72, 4, 3), True), ((5, 7, 3, 2, 1), False)]
)
@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_emulated(cache, monkeypatch, shape, columns, dtype):
    """The real kernels below the product, every check of the emulator on."""
    kernels = Emulated()
    monkeypatch.setattr(cuda, "_kernels", kernels)
    case = make_case(*shape, dtype, adapter_dtype=FP32, dropout_p=0.2)
    if columns:
        case.tensors["weight"] = case.tensors["weight"].t().contiguous().t()
    check_error_rule(case, library_run(case))
    assert kernels.asked == WITHOUT_WEIGHT


@pytest.mark.emulated
@pytest.mark.skipif(emulation.missing_tools() is not None, reason=str(emulation.missing_tools()))
@pytest.mark.parametrize("shape", [(5, 8, 8, 0, 0), (5, 0, 8, 2, 1)])
def test_emulated_where_little_is_to_be_done(cache, monkeypatch, shape):
    monkeypatch.setattr(cuda, "_kernels", Emulated())
    case = make_case(*shape, BF16, adapter_dtype=FP32)
    check_error_rule(case, library_run(case))
