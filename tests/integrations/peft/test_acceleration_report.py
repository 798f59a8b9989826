"""What accelerate changes and what not: reasons to give way, the report, the way back, files, copies, compilation."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook

peft = pytest.importorskip("peft")

from loradash.integrations.peft import accelerate, accelerated, accelerated_layer, decelerate  # noqa: E402
from peft.tuners.lora.layer import Linear as LoraLinear  # noqa: E402
from support.accelerated import adapted  # noqa: E402
from support.layers import Scaled  # noqa: E402

K, N = 16, 12
X = torch.randn(5, K, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def with_kernels(request, monkeypatch):
    if "kernels" not in request.fixturenames:
        monkeypatch.setattr(accelerated_layer, "without_kernels", lambda *call: None)
    torch.manual_seed(0)


@pytest.fixture
def kernels():
    """The question whether there are any is asked."""


def net(layer=None):
    return nn.Sequential(layer or nn.Linear(K, N), nn.Tanh(), nn.Linear(N, N))


def one(**settings):
    """A model whose first layer alone has an adapter, and that layer."""
    model = adapted(net(), target_modules=["0"], **settings)
    return model, model.base_model.model[0]


def hooked(part):
    def change(model, layer):
        module = getattr(layer, part)["default"]
        module.register_forward_hook(lambda *call: None)

    return change


def replaced(part, module):
    return lambda model, layer: getattr(layer, part).update({"default": module})


def in_float64(model, layer):
    layer.lora_A.double(), layer.lora_B.double()


class Loud(torch.Tensor):
    """A subclass of Tensor like those of quantised and sharded weights."""


def subclassed(model, layer):
    a = layer.lora_A["default"]
    a.weight = nn.Parameter(a.weight.detach().as_subclass(Loud))


def patched_forward(model, layer):
    a = layer.lora_A["default"]
    a.forward = lambda x: nn.functional.linear(x, a.weight)


def under_a_hook_on_all_modules(layer):
    handle = register_module_forward_hook(lambda *call: None)
    try:
        return layer(X)
    finally:
        handle.remove()


# Each: what the adapter is made with, what is done to it, and the reason that the report must give.
AT_REST = {
    "DoRA": ({"use_dora": True}, lambda model, layer: None, "DoraLinearVariant"),
    "merged": ({}, lambda model, layer: model.merge_adapter(), "merged"),
    "disabled": ({}, lambda model, layer: layer.enable_adapters(False), "disabled"),
    "no adapter": ({}, lambda model, layer: layer.set_adapter([]), "no active adapter"),
    "hook on A": ({}, hooked("lora_A"), "lora_A or lora_B has hooks"),
    "hook on B": ({}, hooked("lora_B"), "lora_A or lora_B has hooks"),
    "hook on the dropout": ({}, hooked("lora_dropout"), "the dropout has hooks"),
    "another dropout": ({}, replaced("lora_dropout", nn.AlphaDropout(0.0)), "the dropout is a AlphaDropout"),
    "dropout of 1": ({}, replaced("lora_dropout", nn.Dropout(1.0)), "dropout of 1"),
    "another A": ({}, replaced("lora_A", Scaled(K, 4, bias=False)), "lora_A or lora_B is a Scaled"),
    "forward of A": ({}, patched_forward, "the forward of lora_A or lora_B was replaced"),
    "subclass of Tensor": ({}, subclassed, "a weight of an adapter is a Loud"),
    "float64 adapters": ({}, in_float64, "an adapter is torch.float64"),
}
IN_CALLS = {
    "mixed batch": (lambda layer: layer.eval()(X, adapter_names=["default"] * 5), "adapter_names"),
    "subclass of Tensor": (lambda layer: layer(X.as_subclass(Loud)), "the input is a Loud"),
    "torch.func": (lambda layer: torch.func.vmap(layer)(X[:, None])[:, 0], "torch.func"),
    "hooks on all modules": (under_a_hook_on_all_modules, "hooks on all modules"),
}


def counted(report):
    return [(way.how, n) for way, n in report.calls.items()]


@pytest.mark.parametrize("name", AT_REST)
def test_adapters_that_peft_computes(name):
    settings, change, reason = AT_REST[name]
    model, layer = one(**settings)
    change(model, layer)
    wanted = layer(X)
    with pytest.warns(UserWarning, match="no layer runs fused"):
        report = accelerate(model)
    assert torch.equal(layer(X), wanted), "it is PEFT's own forward that runs"
    assert counted(report) == [("PEFT", 1)] and report.fused == 0
    (way,) = report.calls
    assert reason in way.why and report.layers["base_model.model.0"].expected == way
    assert reason in str(report)


@pytest.mark.parametrize("name", IN_CALLS)
def test_calls_that_peft_computes(name):
    run, reason = IN_CALLS[name]
    model, layer = one()
    wanted = run(layer)
    report = accelerate(model)
    assert torch.equal(run(layer), wanted)
    assert report.fused == 0 and all(way.how == "PEFT" and reason in way.why for way in report.calls)
    assert report.layers["base_model.model.0"].expected.how == "fused"


class WithGain(nn.Linear):
    def forward(self, x, gain=1.0):
        return gain * super().forward(x)


def trains(layer):
    layer.base_layer.weight.requires_grad_()


def hooked_base(layer):
    layer.base_layer.register_forward_hook(lambda module, args, y: 2 * y)


def replaced_base(layer):
    weight = layer.base_layer.weight
    layer.base_layer.forward = lambda x: nn.functional.linear(x, weight) + 1


BASES = {
    "trains": (nn.Linear(K, N), trains, {}, "the base layer's weight trains"),
    "hooked": (nn.Linear(K, N), hooked_base, {}, "the base layer has hooks"),
    "replaced": (nn.Linear(K, N), replaced_base, {}, "the base layer's forward was replaced"),
    "its own forward": (Scaled(K, N), lambda layer: None, {}, "support.layers.Scaled"),
    "further arguments": (WithGain(K, N), lambda layer: None, {"gain": 3.0}, "further arguments"),
}


@pytest.mark.parametrize("name", BASES)
def test_bases_that_are_called(name):
    """The base layer is called as it is, once, and the adapters' terms are added to what it gives."""
    base, change, kwargs, reason = BASES[name]
    model = adapted(nn.Sequential(copy.deepcopy(base)))
    layer = model.base_model.model[0]
    change(layer)
    wanted, leaves = layer(X, **kwargs), [p for p in layer.parameters() if p.requires_grad]
    report = accelerate(model)
    ours = layer(X, **kwargs)
    torch.testing.assert_close(ours, wanted, rtol=1e-5, atol=1e-5)
    both = [torch.autograd.grad(y.square().sum(), leaves) for y in (ours, wanted)]
    torch.testing.assert_close(*both, rtol=1e-4, atol=1e-4)
    assert counted(report) == [("beside the base", 1)]
    assert reason in next(iter(report.calls)).why


def test_without_gradients_a_base_that_trains_is_fused():
    model, layer = one()
    trains(layer)
    report = accelerate(model)
    with torch.no_grad():
        wanted = LoraLinear.forward(layer, X)
        torch.testing.assert_close(layer(X), wanted, rtol=1e-5, atol=1e-5)
    assert report.fused == 1


def test_what_peft_refuses_peft_refuses():
    model, layer = one()
    accelerate(model)
    with pytest.raises(TypeError, match="unexpected keyword argument"):
        layer(X, nonsense=1)
    for x in (X[:, :7], X.double(), X.long()):
        with pytest.raises(RuntimeError):
            layer(x)
    layer.cast_input_dtype_enabled = False
    layer.lora_A.bfloat16(), layer.lora_B.bfloat16()
    with pytest.raises(RuntimeError):
        layer(X)


def test_a_device_without_kernels(kernels):
    model, layer = one()
    model.double()
    with pytest.warns(UserWarning, match=r"no kernels for torch.float64 on cpu at a rank of 4"):
        report = accelerate(model)
    layer(X.double())
    assert counted(report) == [("PEFT", 1)]


def test_a_scaling_that_is_a_tensor():
    """As PEFT's compiled hot swap makes it."""
    model, layer = one()
    layer.scaling["default"] = torch.tensor(3.0)
    wanted, report = layer(X), accelerate(model)
    torch.testing.assert_close(layer(X), wanted, rtol=1e-5, atol=1e-5)
    assert report.fused == 1


def test_mica():
    if not hasattr(peft.tuners.lora.variants, "MiCALinearVariant"):
        pytest.skip(f"PEFT {peft.__version__} has no MiCA")
    model, layer = one(init_lora_weights="mica")
    nn.init.normal_(layer.lora_A["default"].weight)
    wanted, report = layer(X), accelerate(model)
    torch.testing.assert_close(layer(X), wanted, rtol=1e-5, atol=1e-5)
    assert report.fused == 1 and not layer.lora_B["default"].weight.requires_grad


def test_the_way_back():
    model = adapted(net(), lora_bias=True)
    classes, keys, said, wanted = [type(m) for m in model.modules()], list(model.state_dict()), repr(model), model(X)
    own = {name: set(m.__dict__) for name, m in model.named_modules()}
    report = accelerate(model)
    assert isinstance(model.base_model.model[0], LoraLinear)
    assert (list(model.state_dict()), repr(model)) == (keys, said)
    torch.testing.assert_close(model(X), wanted, rtol=1e-5, atol=1e-5)
    assert accelerate(model).calls == report.calls, "a second time changes nothing and keeps the counts"
    accelerate(model).undo()
    with accelerated(model):
        model(X)
    assert report.fused == 4, "who changed nothing takes nothing back"
    forward_before = model.base_model.model[0].forward
    report.undo()
    report.undo()
    assert [type(m) for m in model.modules()] == classes and torch.equal(model(X), wanted)
    assert {name: set(m.__dict__) for name, m in model.named_modules()} == own
    assert torch.equal(forward_before(X), model.base_model.model[0](X)), (
        "what others kept of it gives PEFT's results, too"
    )
    accelerate(model)
    assert (decelerate(model), decelerate(model)) == (2, 0)
    with pytest.raises(ZeroDivisionError), accelerated(model):
        raise ZeroDivisionError
    assert [type(m) for m in model.modules()] == classes


def test_copies_and_files(tmp_path):
    model = adapted(net())
    wanted, report = model(X).detach(), accelerate(model)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(model), torch.load(buffer, weights_only=False)):
        again = accelerate(other)
        before = again.fused
        torch.testing.assert_close(other(X), wanted, rtol=1e-5, atol=1e-5)
        assert again.fused == before + 2 and report.fused == 0
    model.save_pretrained(tmp_path)
    base = net()
    for index in (0, 2):
        base[index].load_state_dict(model.base_model.model[index].base_layer.state_dict())
    torch.testing.assert_close(peft.PeftModel.from_pretrained(base, tmp_path)(X), wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model.merge_and_unload()(X), wanted, rtol=1e-5, atol=1e-5)


def test_adapters_that_come_and_go():
    model, _ = one()
    report = accelerate(model)
    model.add_adapter("b", peft.LoraConfig(target_modules=["0", "2"], init_lora_weights=False))
    model.set_adapter("b")
    x = model(X)
    assert report.fused == 1
    added = accelerate(model)
    assert [entry.changed for entry in added.layers.values()] == [False, True]
    torch.testing.assert_close(model(X), x, rtol=1e-5, atol=1e-5)
    assert (report.fused, added.fused) == (2, 3)
    model.base_model.set_adapter(["default", "b"])
    model.delete_adapter("b")
    with model.disable_adapter():
        model(X)
    assert {way.why for way in added.calls} == {"", "adapters are disabled"}


def test_bad_input(monkeypatch):
    with pytest.raises(TypeError, match=r"must be a torch.nn.Module, got str"):
        accelerate("model")
    with pytest.raises(ValueError, match=r"Sequential has no adapters of PEFT; call get_peft_model"):
        accelerate(net())
    model, layer = one()
    monkeypatch.setattr(LoraLinear, "forward", lambda self, x: x)
    with pytest.raises(RuntimeError, match=r"lora.Linear.forward was replaced by"):
        accelerate(model)
    with pytest.raises(RuntimeError, match="either that library or accelerate"), accelerated():
        pass
    assert type(layer) is LoraLinear


def test_layers_of_other_kinds_are_listed():
    model = nn.ModuleDict({"embed": nn.Embedding(4, K), "linear": nn.Linear(K, N)})
    report = accelerate(adapted(model, target_modules=["embed", "linear"]))
    said = {name.rsplit(".")[-1]: str(entry.expected) for name, entry in report.layers.items()}
    assert "lora.layer.Embedding is not lora.Linear" in said["embed"] and "fused" in said["linear"]


def test_a_layer_whose_forward_was_wrapped_runs_that():
    """accelerate's hooks for offloading keep the forward that they found."""
    model, layer = one()
    layer.forward = layer.forward
    with pytest.warns(UserWarning, match="the layer's forward was replaced"):
        report = accelerate(model)
    layer(X)
    assert not report.calls


def test_everywhere():
    """Layers made before the block and inside it; layers of classes derived from lora.Linear keep their own forward."""
    before = adapted(net())
    wanted = before(X)
    with accelerated() as report:
        torch.testing.assert_close(before(X), wanted, rtol=1e-5, atol=1e-5)
        with accelerated() as inner:
            inside = adapted(net())
            y = inside(X)
        assert (report.fused, inner.fused) == (4, 2)
        inside.base_model.model[0].__class__ = type("Derived", (LoraLinear,), {})
        inside(X)
        assert report.fused == 5
        accelerate(before)
        before(X)
        assert report.fused == 7
    assert LoraLinear.forward is accelerated_layer.pefts_forward
    torch.testing.assert_close(inside(X), y, rtol=1e-5, atol=1e-5)
    assert report.fused == 7
    assert "layer 0 (16 to 12)" in str(report) and str(report).endswith("7 calls fused")


@pytest.mark.parametrize("p", [0.0, 0.5])
def test_compiled(kernels, p):
    """One graph for all numbers of rows and whatever runs eagerly between, with the operator in it; nothing is counted."""
    model = adapted(net(), lora_dropout=p)
    report, graphs = accelerate(model), []
    torch._dynamo.reset()
    compiled = torch.compile(
        model, fullgraph=True, backend=lambda graph, inputs: graphs.append(graph) or graph, dynamic=True
    )
    for count, rows in enumerate((5, 7, 9)):
        x = torch.randn(rows, K)
        y = compiled(x)
        y.sum().backward()
        assert report.calls.total() == 2 * count
        difference = (model(x) - y).abs().max()
        assert difference < 1e-5 or p
    assert len(graphs) == 1
    assert ("loradash" in str(graphs[0].graph)) == (report.fused > 0)


def test_graphs_for_others_have_no_operator_of_ours():
    model, layer = one()
    model.eval()
    report = accelerate(model)
    for run in (torch.export.export(layer, (X,)).module(), torch.jit.trace(layer, X)):
        assert "dash_linear" not in str(run.graph) and "linear" in str(run.graph)
        torch.testing.assert_close(run(X), layer(X), rtol=1e-5, atol=1e-5)
    assert "tracing or exporting" in str(report)


def test_training_is_pefts():
    """Losses of ten steps of AdamW, and the merged model."""
    losses = []
    for on in (False, True):
        torch.manual_seed(1)
        model = adapted(net())
        report = accelerate(model) if on else None
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        for _ in range(10):
            loss = (model(X) - 1).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    assert report.fused == 20
    assert losses[10:] == pytest.approx(losses[:10], rel=1e-4)
