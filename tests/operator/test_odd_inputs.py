"""Tensors of unusual kinds, for every backend: the right numbers, or an error that names the argument."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from support.devices import plain_dtype
from support.matrix import close
from torch.nn import functional as F

from loradash_kernels import dash_linear, low_rank_update
from loradash_kernels.testing import make_case

GRADIENTS = ("x", "bias", "lora_a", "lora_b", "dash_sigma")
NAMES = ("x", "weight", "bias", "lora_a", "lora_b", "dash_u", "dash_vt", "dash_sigma")


def call(t, **options):
    t = dict(t)
    return dash_linear(t.pop("x"), t.pop("weight"), t.pop("bias"), **t, **options)


def both(t, dy, backend):
    """Output of `dash_linear`, of `low_rank_update` on an ordinary y, and all gradients."""
    leaves = {n: v.detach().requires_grad_(n in GRADIENTS) for n, v in t.items()}
    y = call(leaves, backend=backend, dropout_p=0.0)
    found = [y.detach(), *torch.autograd.grad(y, [leaves[n] for n in GRADIENTS], dy)]
    adapters = {n: v for n, v in leaves.items() if n not in ("x", "weight", "bias")}
    base = torch.ones_like(y, requires_grad=False)
    z = low_rank_update(base, leaves["x"], **adapters, backend=backend)
    return [*found, z.detach(), *torch.autograd.grad(z, [leaves["x"], leaves["lora_b"]], dy)]


def plain(t):
    """The same values in ordinary memory."""
    return {n: v.detach().resolve_neg().clone(memory_format=torch.contiguous_format) for n, v in t.items()}


# Each gives a tensor of the same shape.
KINDS = {
    "negated": lambda v: torch._neg_view(-v),
    "zero": lambda v: torch._efficientzerotensor(v.shape, dtype=v.dtype, device=v.device),
    "expanded": lambda v: v[:1].expand_as(v),
    "scalar expanded": lambda v: v.flatten()[0].expand_as(v),
    "every second": lambda v: v.repeat_interleave(2, -1)[..., ::2],
    "buffer": lambda v: torch.nn.Buffer(v),
    "parameter": lambda v: torch.nn.Parameter(v, requires_grad=False),
}


@pytest.fixture
def case(backend, device):
    """A small one, of the widest dtype that the backend takes."""
    return make_case(5, 8, 6, 2, 3, plain_dtype(backend), device=device)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", [*NAMES, "dy"])
def test_values_are_right(case, backend, kind, name):
    t = {**case.tensors, "dy": case.dy}
    t[name] = KINDS[kind](t[name])
    ordinary = plain(t)
    dy, expected_dy = t.pop("dy"), ordinary.pop("dy")
    for got, wanted in zip(both(t, dy, backend), both(ordinary, expected_dy, backend), strict=True):
        close(got, wanted)


def test_negated_y(case, backend):
    adapters = {n: v for n, v in case.tensors.items() if n not in ("x", "weight", "bias")}
    y = torch.randn(5, 6).to(case.x)
    found, wanted = (low_rank_update(v, case.x, **adapters, backend=backend) for v in (torch._neg_view(-y), y))
    close(found, wanted)


@pytest.mark.parametrize("shape", [(0, 8, 6), (5, 0, 6), (5, 8, 0), (0, 0, 0)])
@pytest.mark.parametrize(("r", "s"), [(2, 3), (0, 3), (2, 0), (0, 0)])
def test_nothing_in_a_dimension(backend, device, shape, r, s):
    case = make_case(*shape, r, s, plain_dtype(backend), device=device)
    t = {n: v for n, v in case.tensors.items() if v is not None}
    m, k, n = shape
    leaves = {name: v.requires_grad_(name in GRADIENTS) for name, v in t.items()}
    for x in (leaves["x"], leaves["x"].view(1, m, k)):
        y = call({**leaves, "x": x}, backend=backend)
        assert y.shape == (*x.shape[:-1], n)
        expected = F.linear(x, t["weight"], t["bias"]) + x @ t["lora_a"].T @ t["lora_b"].T
        if s:
            expected = expected + ((x @ t["dash_vt"].T) * t["dash_sigma"]) @ t["dash_u"].T
        close(y, expected)
        wanted = [v for v in leaves.values() if v.requires_grad]
        gradients = [torch.autograd.grad(out.sum(), wanted) for out in (y, expected)]
        close(*gradients)
        adapters = {name: v for name, v in leaves.items() if name not in ("x", "weight", "bias")}
        assert low_rank_update(expected.detach(), x, **adapters, backend=backend).shape == y.shape


def test_gradients_asked_without_grad_mode(case, backend):
    expected = call(case.tensors, backend=backend)
    leaves = {n: v.clone().requires_grad_(n in GRADIENTS) for n, v in case.tensors.items()}
    with torch.no_grad():
        y = call(leaves, backend=backend)
    assert not y.requires_grad and torch.equal(y, expected)
    with torch.inference_mode():
        assert torch.equal(call(leaves, backend=backend), expected)
        made_here = {n: v.clone() for n, v in case.tensors.items()}
    close(call(made_here, backend=backend), expected)
    made_here["lora_a"] = leaves["lora_a"]
    with pytest.raises(RuntimeError, match="Inference tensors cannot be saved for backward"):
        call(made_here, backend=backend)


class Tagged(torch.Tensor):
    """A subclass with the behaviour that every subclass inherits."""


class Named(torch.nn.Parameter):
    """A kind of parameter, as libraries of quantised layers have."""


class Opaque(torch.Tensor):
    """A wrapper subclass that knows no operator of ours; its own memory holds nothing."""

    @staticmethod
    def __new__(cls, inner):
        like = {"dtype": inner.dtype, "strides": inner.stride(), "device": inner.device}
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, **like)

    def __tensor_flatten__(self):
        return [], None

    @staticmethod
    def __tensor_unflatten__(inner, context, size, stride):
        raise NotImplementedError

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.detach.default:
            return args[0]
        return NotImplemented


@pytest.mark.parametrize("name", NAMES)
def test_subclasses(case, backend, name):
    t = dict(case.tensors)
    expected = call(t, backend=backend)
    tagged = call({**t, name: t[name].as_subclass(Tagged)}, backend=backend)
    assert type(tagged) is Tagged and torch.equal(tagged.as_subclass(torch.Tensor), expected)
    assert torch.equal(call({**t, name: Named(t[name], requires_grad=False)}, backend=backend), expected)
    with pytest.raises(ValueError, match=f"{name} is a Opaque, which does not take loradash.dash_linear"):
        call({**t, name: Opaque(t[name])}, backend=backend)


def test_gradients_of_a_parameter_subclass(case, backend):
    results = []
    for kind in (torch.nn.Parameter, Named):
        a = kind(case.tensors["lora_a"].clone())
        y = call({**case.tensors, "lora_a": a}, backend=backend)
        results.append(torch.autograd.grad(y, a, case.dy)[0])
    assert torch.equal(*results)


def test_sharded_tensors(tmp_path):
    from torch.distributed.tensor import Replicate, distribute_tensor, init_device_mesh

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        t = dict(make_case(5, 8, 6, 2, 3).tensors)
        sharded = {n: distribute_tensor(v, mesh, [Replicate()]) for n, v in t.items()}
        for name in ("weight", "lora_a", "x"):
            with pytest.raises(ValueError, match=f"{name} is a DTensor"):
                call({**t, name: sharded[name]})
        assert torch.equal(call(sharded).full_tensor(), call(t))
    finally:
        dist.destroy_process_group()


def test_quantised_weight():
    torchao = pytest.importorskip("torchao.quantization")
    model = torch.nn.Sequential(torch.nn.Linear(8, 6))
    torchao.quantize_(model, torchao.Int8WeightOnlyConfig())
    with pytest.raises(ValueError, match=r"weight is a \w+, which does not take loradash\.dash_linear"):
        call({**make_case(5, 8, 6, 2, 3).tensors, "weight": model[0].weight})


def either(name, t):
    """`dash_linear`, or `low_rank_update` where y is what matters."""
    y = t.pop("y")
    if name != "y":
        return call(t)
    return low_rank_update(y, t["x"], **{n: v for n, v in t.items() if n not in ("x", "weight", "bias")})


# PyTorch warns that these layouts are in a beta state.
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("layout", ["to_sparse", "to_sparse_csr", "to_mkldnn"])
@pytest.mark.parametrize("name", [*NAMES, "y"])
def test_layouts_are_named(layout, name):
    t = {**make_case(5, 8, 6, 2, 3).tensors, "y": torch.zeros(5, 6)}
    if layout == "to_sparse_csr" and t[name].dim() == 1:
        layout = "to_sparse"
    t[name] = getattr(t[name], layout)()
    with pytest.raises(ValueError, match=rf"{name} .*layout torch\.\w+"):
        either(name, t)


# PyTorch warns that nested tensors are a prototype.
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_nested_x():
    t = make_case(5, 8, 6, 2, 3).tensors
    for layout in (torch.strided, torch.jagged):
        x = torch.nested.nested_tensor([torch.zeros(2, 8), torch.zeros(3, 8)], layout=layout)
        with pytest.raises(ValueError, match="x is a nested tensor"):
            call({**t, "x": x})


@pytest.mark.parametrize("dtype", [torch.int32, torch.bool, torch.complex64, torch.float8_e4m3fn])
@pytest.mark.parametrize("name", [*NAMES, "y"])
def test_dtypes_are_named(dtype, name):
    t = {**make_case(5, 8, 6, 2, 3).tensors, "y": torch.zeros(5, 6)}
    t[name] = t[name].to(dtype)
    with pytest.raises(ValueError, match=rf"{name} .*{dtype}"):
        either(name, t)


@pytest.mark.parametrize("inside", [False, True])
def test_autocast_is_a_cast_of_the_arguments(backend, device, inside):
    """The same bits as on cast arguments, in both passes: sums inside a backend are not cast again."""
    case = make_case(33, 40, 24, 4, 3, adapter_dtype=torch.float32, device=device)
    half = {n: v.bfloat16() if n in ("x", "weight", "bias") else v for n, v in case.tensors.items()}
    results = []
    for t, on in ((case.tensors, True), (half, False)):
        leaves = {n: v.clone().requires_grad_(n in GRADIENTS) for n, v in t.items()}
        wanted = [leaves[n] for n in GRADIENTS]
        with torch.autocast(device.type, torch.bfloat16, enabled=on):
            y = call(leaves, backend=backend)
            if inside:
                gradients = torch.autograd.grad(y, wanted, case.dy.bfloat16())
        if not inside:
            gradients = torch.autograd.grad(y, wanted, case.dy.bfloat16())
        results.append([y.detach(), *(g.float() for g in gradients)])
    assert results[0][0].dtype == torch.bfloat16
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_operator_itself_under_autocast(backend, device):
    t = make_case(33, 40, 24, 4, 3, plain_dtype(backend), device=device).tensors
    arguments = (*t.values(), None, 2.0, 0, backend)
    expected = torch.ops.loradash.dash_linear(*arguments)
    with torch.autocast(device.type, torch.bfloat16):
        found = torch.ops.loradash.dash_linear(*arguments)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_float64_under_autocast():
    t = make_case(5, 8, 6, 2, 3, torch.float64).tensors
    with torch.autocast("cpu", torch.bfloat16):
        assert F.linear(t["x"], t["weight"], t["bias"]).dtype == torch.float64
        y = call(t)
        assert y.dtype == torch.float64 and torch.equal(y, call(t))
        with pytest.raises(ValueError, match=r"weight is torch\.bfloat16, x is torch\.float64"):
            call({**t, "weight": t["weight"].float()})
    assert torch.equal(y, call(t))


def test_transforms_under_autocast():
    """The formula that transforms take casts the arguments alone, too."""
    t = make_case(5, 8, 6, 2, 3).tensors
    with torch.autocast("cpu", torch.bfloat16):
        expected = call(t, backend="reference")
        found, _ = torch.func.vjp(lambda x: call({**t, "x": x}), t["x"])
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16])
def test_update_under_autocast_has_the_dtype_of_the_base(base, given):
    case = make_case(5, 8, 6, 2, 3)
    adapters = {n: v for n, v in case.tensors.items() if n not in ("x", "weight", "bias")}
    x, y = case.x.to(given).requires_grad_(), case.dy.to(base)
    with torch.autocast("cpu", torch.bfloat16):
        out = low_rank_update(y, x, **adapters)
        vmapped = torch.func.vmap(lambda a, b: low_rank_update(a, b, **adapters))(y, x.detach())
    expected = low_rank_update(y, x.detach().to(base), **adapters)
    assert out.dtype == vmapped.dtype == base and torch.equal(out, expected)
    torch.testing.assert_close(vmapped, low_rank_update(y, x.detach().to(base), **adapters, backend="reference"))
    assert torch.autograd.grad(out.sum(), x)[0].dtype == given
