"""Mixed batches in a model: each sequence has its own adapter, in inference and in training."""

from __future__ import annotations

import copy
import dataclasses

import loradash
import pytest
import torch
from loradash import (
    DashConfig,
    DashLinear,
    DashSchedule,
    adapter_names,
    add_adapter,
    apply_dash,
    dash_parameter_groups,
    dash_state,
    disable,
    hotswap_adapter,
    merge,
    mixed_batch,
    prelaunch,
    save_adapter,
    set_adapter,
    train_adapters,
)
from support import layers as kinds
from support.several import BASE, OTHER, X, alone, filled, network, two
from torch import nn
from torch.utils.checkpoint import checkpoint

NAMES = ["b", None, "default", "b", "base", "default"]


def expected(model, names=NAMES, x=X):
    found = {name: alone(model, None if name in (None, "base") else name, x) for name in set(names)}
    return torch.stack([found[name][i] for i, name in enumerate(names)])


@pytest.mark.parametrize("names", [NAMES, ["default"] * 3 + ["b"] * 3, ["b"] * 6, [None] * 6], ids=str)
@pytest.mark.parametrize("shape", [(6, 5, 20), (6, 20)], ids=str)
def test_every_row_is_that_of_its_adapter(names, shape):
    model, x = two(), X.reshape(-1, 20)[: torch.Size(shape).numel() // 20].reshape(shape)
    wanted = expected(model, names, x)
    with mixed_batch(model, names) as inside:
        assert inside is model
        torch.testing.assert_close(model(x), wanted, rtol=1e-5, atol=1e-5)
    assert torch.equal(model(x), alone(model, "default", x)) and "_mixed_rows" not in vars(model[0])


def test_the_active_adapter_does_not_matter_and_blocks_nest():
    model = two()
    wanted = expected(model)
    set_adapter(model, "b")
    with mixed_batch(model, NAMES):
        torch.testing.assert_close(model(X), wanted, rtol=1e-5, atol=1e-5)
        with mixed_batch(model, ["default"] * 6):
            torch.testing.assert_close(model(X), alone_now(model, "default"), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(model(X), wanted, rtol=1e-5, atol=1e-5)
        with disable(model):
            torch.testing.assert_close(model(X), network()(X))
        with pytest.raises(ValueError, match="adapters of a mixed batch stay where they are"):
            set_adapter(model, "default")
        with pytest.raises(ValueError, match="is in a mixed batch; merge after its block"):
            merge(model)
        with pytest.raises(RuntimeError, match="out of here"), mixed_batch(model, [None] * 6):
            raise RuntimeError("out of here")
        torch.testing.assert_close(model(X), wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model(X), alone(model, "b"))


def alone_now(model, name):
    """Inside a block: of a copy outside of it."""
    twin = copy.deepcopy(model)
    for layer in twin.modules():
        vars(layer).pop("_mixed_rows", None)
    return alone(twin, name)


def test_gradients_are_those_of_each_adapters_rows():
    model = two()
    train_adapters(model, ["b"])
    twin = copy.deepcopy(model)
    target = torch.randn(6, 5, 3, generator=torch.Generator().manual_seed(3))
    with mixed_batch(model, NAMES):
        (model(X) * target).sum().backward()
    for name in ("default", "b"):
        set_adapter(twin, name)
        mine = [i for i, n in enumerate(NAMES) if n == name]
        (twin(X[mine]) * target[mine]).sum().backward()
    found = {n: p.grad for n, p in by_adapter(model)}
    wanted = {n: p.grad for n, p in by_adapter(twin)}
    assert found.keys() == wanted.keys() and len(found) == 12
    for name, gradient in wanted.items():
        assert gradient.any()
        torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-6)


def by_adapter(model):
    for name, layer in model.named_modules():
        for adapter in layer.adapters if isinstance(layer, DashLinear) else ():
            for key in ("lora_a", "lora_b", "dash_sigma"):
                yield (name, adapter, key), layer.part(adapter, key)


def test_both_train_and_launch_in_mixed_batches():
    """One optimizer for all; each adapter's own schedule counts, and launches at its own step."""
    torch.manual_seed(0)
    model = apply_dash(network(), DashConfig(r=2, directions=2, prelaunch_steps=2))
    first = DashSchedule(model, progress=False)
    add_adapter(model, "b", DashConfig(r=2, directions=3, prelaunch_steps=4, target_modules=["2"]))
    set_adapter(model, "b")
    second = DashSchedule(model, progress=False)
    set_adapter(model, "default")
    train_adapters(model, ["b"])
    optimizer = torch.optim.AdamW(dash_parameter_groups(model, lr=1e-2))
    launched = []
    for _ in range(5):
        optimizer.zero_grad()
        with mixed_batch(model, ["default", "b"] * 3):
            model(X).square().mean().backward()
        optimizer.step()
        launched.append((first.step(), second.step()))
    assert launched == [(False, False), (True, False), (False, False), (False, True), (False, False)]
    assert model[2].part("b", "launched") and model[2].part("b", "dash_sigma").any()
    assert loradash.active_adapter(model) == "default" and dash_state(model).step == 5
    # The launch of the parked one has frozen nobody.
    assert model[2].part("b", "lora_a").requires_grad and model[2].lora_a.requires_grad


class Checkpointed(nn.Module):
    def __init__(self, reentrant):
        super().__init__()
        self.inner, self.reentrant = network(), reentrant

    def forward(self, x):
        return checkpoint(self.inner, x, use_reentrant=self.reentrant)


@pytest.mark.parametrize("stop", [1, 2, 3], ids=["before", "one launched", "both launched"])
def test_a_run_in_mixed_batches_goes_on_from_its_checkpoint(stop, tmp_path):
    """The optimizer knows the Δσ of each adapter since its own launch."""

    def run(seed):
        torch.manual_seed(seed)
        model = apply_dash(network(), dataclasses.replace(BASE, prelaunch_steps=1))
        add_adapter(model, "b", dataclasses.replace(OTHER, prelaunch_steps=2))
        for module in model.modules():
            if "lora_a" in module._parameters:
                nn.init.normal_(module.lora_a, std=0.3, generator=torch.Generator().manual_seed(seed))
        set_adapter(model, "b")
        beside = DashSchedule(model, progress=False)
        set_adapter(model, "default")
        train_adapters(model, ["b"])
        optimizer = torch.optim.AdamW(dash_parameter_groups(model, lr=1e-2))
        return model, optimizer, DashSchedule(model, progress=False), beside

    def steps(run, number):
        model, optimizer, *schedules = run
        losses = []
        for _ in range(number):
            with mixed_batch(model, NAMES):
                loss = model(X).square().mean()
                loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            for schedule in schedules:
                schedule.step()
            losses.append(loss.item())
        return losses

    before, again = run(1), run(2)
    steps(before, stop)
    loradash.save_training(tmp_path, *before[:3], beside=before[3])
    loradash.load_training(tmp_path, *again[:3], beside=again[3])
    assert steps(again, 3) == steps(before, 3)


def test_checkpoints():
    config = DashConfig(r=2, directions=2)
    gradients = []
    for wrapped in (True, False):
        model = apply_dash(Checkpointed(False) if wrapped else network(), config)
        add_adapter(model, "b", DashConfig(r=2, directions=2))
        filled(model)
        train_adapters(model, ["b"])
        with mixed_batch(model, NAMES):
            model(X).sum().backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True)) and len(gradients[0]) == 18
    with mixed_batch(model, NAMES):
        loss = model(X).sum()
    with pytest.raises(RuntimeError, match="backward pass of a mixed batch belongs into its block"):
        loss.backward()
    reentrant = filled(apply_dash(Checkpointed(True), config))
    x = X.clone().requires_grad_()
    with pytest.raises(RuntimeError, match="use_reentrant=True"), mixed_batch(reentrant, ["default"] * 6):
        reentrant(x)
    with torch.no_grad(), mixed_batch(reentrant.eval(), ["default"] * 6):
        torch.testing.assert_close(reentrant(x), alone_now(reentrant, "default"))


def test_errors():
    model = two()
    with pytest.raises(ValueError, match="no adapter 'c'; it has default, b"), mixed_batch(model, ["b", "c"]):
        pass
    with pytest.raises(ValueError, match="index must be one integer"), mixed_batch(model, []):
        pass
    with (
        mixed_batch(model, ["b", None]),
        pytest.raises(ValueError, match=r"^0: x has shape \(6, 5, 20\); wanted \(2, ..., K\)"),
    ):
        model(X)
    merge(model)
    with pytest.raises(ValueError, match=r"unmerge\(model\) first; merged: 0, 2"), mixed_batch(model, NAMES):
        pass


@pytest.mark.parametrize("make", [kinds.linear, kinds.patched, kinds.hooked, kinds.Scaled], ids=lambda m: m.__name__)
def test_layers_of_every_kind(make):
    torch.manual_seed(0)
    layer = make(kinds.WIDTH, kinds.WIDTH) if make is kinds.Scaled else make()
    model = apply_dash(nn.Sequential(layer, nn.Tanh(), nn.Linear(kinds.WIDTH, 4)), DashConfig(r=2, directions=2))
    add_adapter(model, "b", DashConfig(r=3, directions=1, target_modules=["0"]))
    filled(model)
    x = torch.randn(4, 3, kinds.WIDTH)
    names = ["b", "default", None, "b"]
    wanted = expected(model, names, x)
    with mixed_batch(model, names):
        torch.testing.assert_close(model(x), wanted, rtol=1e-5, atol=1e-5)
    set_adapter(model, "b")
    with mixed_batch(model, names):
        torch.testing.assert_close(model(x), wanted, rtol=1e-5, atol=1e-5)


def test_a_whole_model_with_conv1d():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    settings = transformers.GPT2Config(n_layer=2, n_embd=32, n_head=2, vocab_size=40, n_positions=16)
    model = apply_dash(
        transformers.GPT2LMHeadModel(settings).eval(), DashConfig(r=2, directions=2, target_modules=["c_attn"])
    )
    add_adapter(model, "b", DashConfig(r=2, directions=2, target_modules=["c_attn", "c_fc"]))
    filled(model)
    ids = torch.randint(40, (3, 8))

    class Logits(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, x):
            return self.model(input_ids=x).logits

    wrapped, names = Logits(), ["b", None, "default"]
    wanted = expected(wrapped, names, ids)
    with mixed_batch(wrapped, names):
        torch.testing.assert_close(wrapped(ids), wanted, rtol=1e-4, atol=1e-4)


def test_nothing_is_compiled_anew():
    """Switches between adapters of one shape and scaling, hot swaps, launch, mixes of one division; and what does compile."""
    made = []

    def backend(graph, inputs):
        made.append(1)
        return graph.forward

    same = DashConfig(r=3, directions=2, alpha=8)
    model = two(default=same, b=same, c=DashConfig(r=3, directions=2, alpha=5)).eval()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend, fullgraph=True)

    def compilations():
        before = len(made)
        torch.testing.assert_close(compiled(X), model(X))
        return len(made) - before

    assert compilations() == 1
    for name in ("b", "default", "b"):
        set_adapter(compiled, name)
        assert compilations() == 0
    for names, count in ((NAMES, 1), (["default", "b", None] * 2, 0)):
        with mixed_batch(compiled, names):
            assert compilations() == count
    assert compilations() == 0
    for layer in loradash.dash_layers(model).values():
        layer.launched.fill_(False)
    prelaunch(model, progress=False)
    assert compilations() == 0
    # Another scaling is another constant, once.
    set_adapter(model, "c")
    assert compilations() >= 1
    set_adapter(model, "b")
    assert compilations() == 0
    set_adapter(model, "c")
    assert compilations() == 0


def test_a_hot_swap_compiles_nothing(tmp_path):
    made = []

    def backend(graph, inputs):
        made.append(1)
        return graph.forward

    small = {"small": DashConfig(r=2, directions=1, alpha=12, target_modules=["0", "4"])}
    source = two(default=DashConfig(r=4, directions=3, alpha=2), **small)
    for name in adapter_names(source):
        save_adapter(source, tmp_path / name, adapter=name)
    model = filled(apply_dash(network(), DashConfig(r=4, directions=3, alpha=8)), seed=4).eval()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    compiled(X)
    tensors = {k: t.data_ptr() for k, t in model.state_dict().items()}
    for name in ("small", "default", "small"):
        hotswap_adapter(compiled, tmp_path / name)
        torch.testing.assert_close(compiled(X), alone(source, name), rtol=1e-5, atol=1e-5)
    assert len(made) == 1 and {k: t.data_ptr() for k, t in model.state_dict().items()} == tensors
    # What was swapped in is an adapter of this model's settings.
    save_adapter(model, tmp_path / "again")
    torch.testing.assert_close(loradash.load_adapter(network(), tmp_path / "again")(X), model(X))
    hotswap_adapter(model, tmp_path / "default")
    # A ratio of two powers of two rounds nothing.
    assert torch.equal(model[0].lora_b, source[0].lora_b * 0.25) and torch.equal(model[0].lora_a, source[0].lora_a)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"r": 5}, r"0.lora_a has shape \(5, 20\), the model wants \(4, 20\)"),
        ({"directions": 4}, r"0.dash_sigma has shape \(4,\), the model wants \(3,\)"),
        ({"target_modules": ["4"]}, "4.dash_sigma has no place in the model"),
        (
            {"trainable_modules": ["4"], "target_modules": ["0"]},
            "the file's adapter has trained biases or modules beside",
        ),
    ],
)
def test_hot_swaps_that_do_not_fit_change_nothing(settings, message, tmp_path):
    save_adapter(filled(apply_dash(network(), DashConfig(**{"r": 2, "directions": 2, **settings}))), tmp_path)
    model = filled(apply_dash(network(), DashConfig(r=4, directions=3, target_modules=["0", "2"])))
    before = {k: t.clone() for k, t in model.state_dict().items()}
    with pytest.raises(loradash.AdapterError, match=message):
        hotswap_adapter(model, tmp_path)
    assert all(torch.equal(t, before[k]) for k, t in model.state_dict().items())
    merge(model)
    with pytest.raises(ValueError, match=r"unmerge\(model\) before hotswap_adapter"):
        hotswap_adapter(model, tmp_path)
