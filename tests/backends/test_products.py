"""The reference on a GPU: products of the library and dropout in one kernel, computed here on the CPU."""

from __future__ import annotations

import pytest
import torch
from support import jitted
from support.calls import base_product, calls, drawn_seed, outputs, results
from support.cards import OnCard, backward_call, forward_call
from support.layouts import slices, transposed
from support.shapes import DTYPES, SHAPES
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from loradash_kernels.backends import fused_dropout, products, reference
from loradash_kernels.random import draw_seed, dropout_mask, dropout_threshold, window
from loradash_kernels.testing import check_error_rule, make_case

FP32, BF16 = torch.float32, torch.bfloat16
pytestmark = pytest.mark.skipif(jitted.missing() is not None, reason=str(jitted.missing()))


@pytest.fixture(scope="module")
def draw(tmp_path_factory):
    return jitted.compiled(tmp_path_factory.mktemp("jitted"))


@pytest.fixture
def drawn(draw, monkeypatch):
    """Dropout is drawn by the formula that GPUs compile."""
    monkeypatch.setattr(fused_dropout, "_kernel", lambda device: draw)


def products_run(case, base=True, only=None):
    out = outputs(case, base)
    if only:
        out = {name: v if name in ("y", "p", only) else None for name, v in out.items()}
    forward, backward = calls(case, out, drawn_seed(case), None if base else base_product(case))
    products.forward(forward)
    products.backward(backward)
    return results(case, out, base)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (1, 8), (3, 7), (5, 16), (64, 33), (130, 200), (0, 8), (8, 0)])
@pytest.mark.parametrize("p", [0.0, 0.05, 0.5, 0.999])
def test_masks_bit_for_bit(drawn, shape, dtype, p):
    torch.manual_seed(sum(shape))
    for _ in range(3):
        seed, x = draw_seed(), torch.randn(shape).to(dtype)
        mask = dropout_mask(seed, dropout_threshold(p), *shape)
        found = fused_dropout.dropped(x, seed, dropout_threshold(p))
        assert found.dtype == dtype and torch.equal(found, torch.where(mask, x, 0))


@pytest.mark.parametrize(
    "seed", [(0, 0), (-1, -1), (2**63 - 1, -(2**63)), (1 << 32, 1), (0xFFFFFFFF, 0xFFFFFFFF00000000 - 2**64)]
)
def test_masks_of_seeds_at_the_edges(drawn, seed):
    seed, x = torch.tensor(seed), torch.ones(17, 40)
    assert torch.equal(fused_dropout.dropped(x, seed, 30000) == 1, dropout_mask(seed, 30000, 17, 40))


@pytest.mark.parametrize("dtype", DTYPES)
def test_masks_where_memory_is_laid_out_otherwise(drawn, dtype):
    """Odd addresses, odd pitches, columns, a stride of zero, a sign in the view."""
    wide, seed = torch.randn(20, 41).to(dtype), torch.tensor([5, 7])
    for x in (
        wide[:, 1:33],
        wide[:, :32],
        wide[3:, 2:],
        wide.t(),
        wide[::2, 4:12],
        wide[:1].expand(9, 41),
        torch._neg_view(wide),
    ):
        mask = dropout_mask(seed, 20000, *x.shape)
        assert torch.equal(fused_dropout.dropped(x, seed, 20000), torch.where(mask, x, 0))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("place", [(0, 0), (5, 24), (2**32 - 17, 2**32 - 40), (2**31 - 1, 2**31 - 8)])
def test_masks_of_windows(drawn, place, dtype):
    part, x = window(draw_seed(), *place), torch.ones(17, 39, dtype=dtype)
    assert torch.equal(fused_dropout.dropped(x, part, 30000) == 1, dropout_mask(part, 30000, 17, 39))


def test_zeros_without_memory_stay_zeros(monkeypatch):
    monkeypatch.setattr(fused_dropout, "_kernel", None)
    found = fused_dropout.dropped(torch._efficientzerotensor((3, 8)), torch.tensor([1, 2]), 9000)
    assert torch.equal(found + 0, torch.zeros(3, 8))


def test_the_code_is_what_jiterator_parses():
    assert torch.cuda.jiterator._create_jit_fn(fused_dropout.CODE, threshold=0, elements=1).kernel_name == "kept_bits"


def test_without_jiterator_the_eager_formula_draws_and_says_so(monkeypatch, unwarned):
    fused_dropout._kernel.cache_clear()
    x, seed = torch.randn(6, 10), torch.tensor([1, 2])
    with pytest.warns(UserWarning, match="jiterator cannot be used") as said:
        found = [fused_dropout.dropped(x, seed, 9000) for _ in range(2)]
    assert len(said) == 1 and all(torch.equal(f, x * dropout_mask(seed, 9000, 6, 10)) for f in found)
    fused_dropout._kernel.cache_clear()


def pretend_jiterator(monkeypatch, run):
    """A jiterator whose functions do this, with tensors of the CPU."""
    monkeypatch.setattr(torch.cuda.jiterator, "_create_jit_fn", lambda code, **options: run)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    fused_dropout._kernel.cache_clear()


def test_the_trial_compiles_what_every_call_runs(monkeypatch):
    """PyTorch compiles one kernel for operands that lie alike and another for those that do not."""
    asked = []

    def run(*tensors, **options):
        *tensors, first = torch.broadcast_tensors(*tensors)[::-1]
        asked.append(all(t.is_contiguous() for t in (first, *tensors)))
        return first.clone()

    pretend_jiterator(monkeypatch, run)
    for shape in ((1, 4), (4, 1), (3, 8)):
        fused_dropout.dropped(torch.ones(shape), torch.tensor([1, 2]), 9000)
    fused_dropout._kernel.cache_clear()
    assert asked == [False] * 4


def test_a_capture_before_the_first_run_is_refused_and_nothing_is_remembered(monkeypatch, draw, unwarned):
    """Modules cannot be loaded while a graph is captured. The process draws in one kernel afterwards all the same."""
    capturing = True

    def run(*tensors, **options):
        if capturing:
            raise RuntimeError("operation not permitted when stream is capturing")
        return draw(*tensors, **options)

    pretend_jiterator(monkeypatch, run)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    x, seed = torch.ones(3, 8), torch.tensor([1, 2])
    with pytest.raises(RuntimeError, match="run the layer once before it is captured"):
        fused_dropout.dropped(x, seed, 9000)
    capturing = False
    assert torch.equal(fused_dropout.dropped(x, seed, 9000) == 1, dropout_mask(seed, 9000, 3, 8))
    fused_dropout._kernel.cache_clear()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [*SHAPES, (0, 8, 8, 2, 1), (5, 0, 8, 2, 1), (5, 8, 0, 2, 1)])
def test_shapes(drawn, shape, dtype):
    case = make_case(*shape, dtype, adapter_dtype=FP32, dropout_p=0.1)
    check_error_rule(case, products_run(case))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", [{"bias": False}, {"dropout_p": 0.0}, {"dropout_p": 0.9}])
@pytest.mark.parametrize(("r", "s"), [(4, 0), (0, 4), (0, 0), (8, 4)])
def test_options(drawn, options, r, s, dtype):
    check = make_case(37, 40, 48, r, s, dtype, adapter_dtype=FP32, **options)
    check_error_rule(check, products_run(check))


def test_an_update_of_no_rank_passes_no_gradient_to_x(drawn):
    case = make_case(5, 8, 16, 0, 0, FP32)
    check_error_rule(case, products_run(case, base=False))


@pytest.mark.parametrize("layout", [slices, transposed])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("base", [True, False])
def test_layouts(drawn, layout, dtype, base):
    case = make_case(70, 96, 80, 8, 4, dtype, adapter_dtype=FP32, dropout_p=0.1)
    layout(case)
    check_error_rule(case, products_run(case, base))


@pytest.mark.parametrize("wanted", ["x", "lora_a", "lora_b", "dash_sigma", "bias"])
def test_one_gradient_alone(drawn, wanted):
    case = make_case(40, 32, 48, 4, 2, BF16, adapter_dtype=FP32, dropout_p=0.1)
    assert torch.equal(products_run(case, only=wanted)[wanted], products_run(case)[wanted])


VIEWS = {
    "view",
    "t",
    "transpose",
    "detach",
    "slice",
    "expand",
    "unsqueeze",
    "unbind",
    "select",
    "alias",
    "as_strided",
    "empty",
    "new_empty",
    "_unsafe_view",
    "permute",
}


class Launches(TorchDispatchMode):
    """Counts the operators that a GPU would launch kernels for: all but views and allocations."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.removeprefix("aten::")
        if name not in VIEWS:
            self.names.append(name)
        return func(*args, **(kwargs or {}))


def launches(run, call):
    with Launches() as counted:
        run(call)
    return len(counted.names)


def test_few_kernels(monkeypatch):
    """Against the formula of the reference, which draws its masks in 64-bit integers. Dropout is one call here, as on a GPU."""
    case = make_case(64, 64, 64, 16, 8, BF16, adapter_dtype=FP32, dropout_p=0.05)
    forward, backward = calls(case, outputs(case), drawn_seed(case))
    eager = launches(reference._forward, forward), launches(reference._backward, backward)
    monkeypatch.setattr(products, "_wide_product", lambda a, b, out: torch.mm(out, out.new_empty(out.shape[1], 1)))
    monkeypatch.setattr(fused_dropout, "_kernel", lambda device: lambda bits, *args, threshold, elements: bits.clone())
    fused = launches(products.forward, forward), launches(products.backward, backward)
    print(f"operators that launch: {eager} by the formula, {fused} as products")
    assert fused[0] <= 20 and fused[1] <= 30 and eager[0] > 300 and eager[1] > 600


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("make", [forward_call, backward_call])
def test_which_calls_take_this_path(monkeypatch, make, dtype):
    """Those on a card, float64 apart, which keeps its precision."""
    ran = []
    for module, names in ((products, ("forward", "backward")), (reference, ("_forward", "_backward"))):
        for name in names:
            monkeypatch.setattr(module, name, lambda call, module=module: ran.append(module))
    for x in (OnCard(dtype), torch.zeros(2, 4, dtype=dtype)):
        call = make(x)
        getattr(reference, call.pass_)(call)
    assert ran == [reference if dtype == torch.float64 else products, reference]


@pytest.mark.skipif(torch.version.cuda is None, reason="this PyTorch has no CUDA, which fake tensors of a card ask for")
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_card_takes_this_path(monkeypatch, dtype):
    """On fake tensors of a card the reference runs these products, 16-bit operands summed into float32 as PyTorch does it."""
    monkeypatch.setattr(fused_dropout, "_kernel", lambda device: lambda bits, *args, threshold, elements: bits.clone())
    case = make_case(8, 16, 24, 4, 2, dtype, adapter_dtype=FP32, dropout_p=0.1)
    forward, backward = calls(case, outputs(case), drawn_seed(case))
    with FakeTensorMode() as mode, torch.no_grad():
        for run, call in ((reference.forward, forward), (reference.backward, backward)):
            on_card = [mode.from_tensor(t).to("cuda") if isinstance(t, torch.Tensor) else t for t in call]
            with Launches() as counted:
                run(type(call)(*on_card))
            assert "mm" in counted.names and not {"bitwise_and", "bitwise_xor"} & set(counted.names)
