"""Layers divided by ColwiseDash and RowwiseDash, against whole ones: `CHECKS`, each a function of the meshes and a folder."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import loradash
import torch
import torch._dynamo.testing
from loradash import DashConfig, DashLinear, DashSchedule, SpectralCache, apply_dash
from loradash.distributed import gathered
from loradash.tensor_parallel import ColwiseDash, RowwiseDash, clip_grad_norm_, parallelize
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, PrepareModuleInput, parallelize_module
from torch.utils.checkpoint import checkpoint

from loradash_kernels import sharded

from .collectives import Traffic
from .sharded import Meshes, raises

WIDTH, HIDDEN = 32, 64


class Pair(nn.Module):
    """x + down(tanh(up(x)))."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(x)))


def pair(dropout: float = 0.25, launched: bool = True, **settings: Any) -> nn.Module:
    """Two adapted layers with updates, the same in every process."""
    torch.manual_seed(0)
    model = apply_dash(Pair(), DashConfig(r=3, directions=2, dropout=dropout, prelaunch_steps=2, **settings))
    for layer in (model.up, model.down):
        nn.init.normal_(layer.lora_b, std=0.1)
        if launched:
            nn.init.normal_(layer.dash_sigma)
            nn.init.normal_(layer.dash_u)
            nn.init.normal_(layer.dash_vt)
            layer.launched.fill_(True)
    return model


PLAN = {"up": ColwiseDash(), "down": RowwiseDash()}


def divided(mesh: DeviceMesh, plan: dict[str, Any] = PLAN, **settings: Any) -> nn.Module:
    return parallelize_module(pair(**settings), mesh, plan)


def result(call: Callable[..., Tensor], model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Output and gradients of a call with one seed, whole."""
    torch.manual_seed(3)
    x = x.clone().requires_grad_()
    y = call(x)
    y = y.full_tensor() if isinstance(y, DTensor) else y
    model.zero_grad()
    y.square().sum().backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    assert all(g is not None for g in gradients.values()), [n for n, g in gradients.items() if g is None]
    return {"y": y.detach(), "x": x.grad, **{n: gathered(g) for n, g in gradients.items()}}


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys(), f"{sorted(ours)}, wanted {sorted(theirs)}"
    for name, t in theirs.items():
        gap = (ours[name] - t).abs().max() / t.abs().max().clamp_min(1e-30)
        assert gap < 1e-5, f"{name}: a gap of {gap:.3g}"


def inputs() -> Tensor:
    return torch.randn(3, 4, WIDTH, generator=torch.Generator().manual_seed(9))


def degrees(meshes: Meshes, folder: Path) -> None:
    """One, two and four processes draw one mask and compute one result."""
    model = pair(train_bias=True)
    wanted = result(model, model, inputs())
    for mesh in (meshes.pair, meshes.four):
        model = divided(mesh, train_bias=True)
        assert_same(result(model, model, inputs()), wanted)


def layouts(meshes: Meshes, folder: Path) -> None:
    """Sequence-parallel borders, DTensors from layer to layer, x divided by the parent, and another order of the weight."""
    plain, mesh, x = pair(), meshes.pair, inputs()
    wanted = result(plain, plain, x)
    sequence = {"up": ColwiseDash(input_layouts=Shard(1)), "down": RowwiseDash(output_layouts=Shard(1))}
    model = divided(mesh, sequence)

    def by_length(x: Tensor) -> Tensor:
        whole = DTensor.from_local(x, mesh, [Replicate()], run_check=False)
        part = whole.redistribute(placements=[Shard(1)]).to_local()
        return DTensor.from_local(model(part), mesh, [Shard(1)], run_check=False)

    assert_same(result(by_length, model, x), wanted)
    tensors = {"up": ColwiseDash(use_local_output=False), "down": RowwiseDash(use_local_output=False)}
    model = divided(mesh, tensors)
    assert_same(result(lambda x: x + model.down(torch.tanh(model.up(x))).to_local(), model, x), wanted)
    # The parent's style redistributes without waiting.
    around = PrepareModuleInput(input_layouts=(Shard(1),), desired_input_layouts=(Replicate(),))
    model = parallelize_module(
        divided(mesh, {**tensors, "down": RowwiseDash(use_local_output=False)}), mesh, {"": around}
    )

    def by_parent(x: Tensor) -> Tensor:
        whole = DTensor.from_local(x, mesh, [Replicate()], run_check=False)
        return model(whole.redistribute(placements=[Shard(1)]).to_local())

    assert_same(result(by_parent, model, x), wanted)
    turned = pair()
    for layer in (turned.up, turned.down):
        layer.weight = nn.Parameter(layer.weight.detach().t().contiguous(), requires_grad=False)
        layer.transposed = True
    turned = parallelize_module(turned, mesh, PLAN)
    assert turned.up.weight.placements == (Shard(1),)
    assert_same(result(turned, turned, x), wanted)


def checkpointing(meshes: Meshes, folder: Path) -> None:
    model = divided(meshes.pair)
    wanted = result(model, model, inputs())
    for reentrant in (False, True):
        assert_same(result(lambda x, r=reentrant: checkpoint(model, x, use_reentrant=r), model, inputs()), wanted)


def compiled(meshes: Meshes, folder: Path) -> None:
    """One graph, the masks of one process, and no compilation more at launch."""
    sharded._WATCHES.clear()
    if meshes.rank >= 2:
        return
    whole, model = pair(launched=False), divided(meshes.pair, launched=False)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    fast = torch.compile(model, fullgraph=True, backend=counter)
    for value in (0.0, 0.1):
        with torch.no_grad():
            for layer in (whole.up, whole.down, model.up, model.down):
                layer.dash_sigma.fill_(5 * value)
                layer.dash_u.fill_(value)
                layer.dash_vt.fill_(value)
        assert_same(result(fast, model, inputs()), result(whole, whole, inputs()))
    assert counter.frame_count == 1, f"{counter.frame_count} compilations"
    sharded._WATCHES.clear()
    torch.manual_seed(meshes.rank)
    with raises(RuntimeError, "drew different seeds"):
        fast(inputs())
    sharded._WATCHES.clear()


def traffic(meshes: Meshes, folder: Path) -> None:
    """Beside the frozen layers: nothing in forward, one sum a layer in backward."""
    plan = {"up": ColwiseDash(), "down": RowwiseDash()}
    frozen = parallelize_module(Pair().requires_grad_(False), meshes.pair, plan)
    adapted, sent = divided(meshes.pair, launched=False, dropout=0.0), []
    for model in (frozen, adapted):
        x = inputs().requires_grad_()
        with Traffic() as forward:
            y = model(x).sum()
        with Traffic() as backward:
            y.backward()
        sent.append((forward, backward))
    (forward, backward), (ours, ours_backward) = sent
    assert ours.bytes == forward.bytes and ours.calls == forward.calls == {"all_reduce": 1}
    r, s = 3, 2
    more = 4 * (r * WIDTH + s) + 4 * (WIDTH * r + s)
    assert ours_backward.bytes == {"all_reduce": backward.bytes["all_reduce"] + more}, ours_backward.bytes
    assert ours_backward.calls["all_reduce"] == backward.calls["all_reduce"] + 2


class Headed(nn.Module):
    """A pair, and a head that trains as a whole and is not divided."""

    def __init__(self) -> None:
        super().__init__()
        self.pair, self.head = Pair(), nn.Linear(WIDTH, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.pair(x))


def clipping(meshes: Meshes, folder: Path) -> None:
    """torch's clip_grad_norm_ where all gradients are DTensors of one mesh; ours where they are not."""

    def headed() -> nn.Module:
        torch.manual_seed(0)
        model = apply_dash(Headed(), DashConfig(r=3, directions=2, dropout=0.25, trainable_modules=["head"]))
        nn.init.normal_(model.pair.up.lora_b)
        return model

    def clipped(model: nn.Module, clip: Callable[..., Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        result(model, model, inputs())
        trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
        norm = clip(trained.values(), 0.5)
        return gathered(norm), {n: gathered(p.grad) for n, p in trained.items()}

    divide = {f"pair.{name}": style for name, style in PLAN.items()}
    fully = parallelize_module(headed(), meshes.pair, divide)
    for module in (fully.pair.up, fully.pair.down, fully):
        fully_shard(module, mesh=meshes.two_by_two["dp"])
    of_torch = nn.utils.clip_grad_norm_
    for plain, model, clip in (
        (pair(), divided(meshes.pair), of_torch),
        (pair(), divided(meshes.pair), clip_grad_norm_),
        (headed(), parallelize_module(headed(), meshes.pair, divide), clip_grad_norm_),
        (headed(), fully, clip_grad_norm_),
    ):
        norm, gradients = clipped(plain, of_torch)
        found, ours = clipped(model, clip)
        torch.testing.assert_close(found, norm)
        assert_same(ours, gradients)
    with raises(RuntimeError, "mixed torch.Tensor and DTensor"):
        clipped(parallelize_module(headed(), meshes.pair, divide), of_torch)


def clipping_of_any_placement(meshes: Meshes, folder: Path) -> None:
    """Partial sums count as what they sum to, on whichever mesh; a tensor alone is taken like a list of one."""
    dp, tp = meshes.two_by_two["dp"], meshes.pair

    def of(local: Tensor, mesh: DeviceMesh, placement: Any) -> nn.Parameter:
        gradient = DTensor.from_local(local, mesh, [placement], run_check=False)
        parameter = nn.Parameter(torch.zeros_like(gradient.redistribute(placements=[Replicate()])))
        parameter.grad = gradient
        return parameter

    parameters = [
        of(torch.full((2, 2), 1.0 + tp.get_local_rank()), tp, Partial()),
        of(torch.ones(2, 2), tp, Replicate()),
        of(torch.ones(2, 2), dp, Shard(0)),
    ]
    wanted = torch.tensor(4 * 9.0 + 4 + 8).sqrt()
    torch.testing.assert_close(clip_grad_norm_(parameters, 1.0), wanted)
    for parameter, value in zip(parameters, (3.0, 1.0, 1.0), strict=True):
        torch.testing.assert_close(gathered(parameter.grad).mean(), value / wanted)
    torch.testing.assert_close(clip_grad_norm_(parameters, 1.0, norm_type=math.inf), 3.0 / wanted)
    torch.testing.assert_close(clip_grad_norm_(parameters[1], 1.0), 2.0 / wanted)


def functions_of_models(meshes: Meshes, folder: Path) -> None:
    """What loradash does with a whole model."""
    plain, model, x = pair(launched=False), divided(meshes.pair, launched=False), inputs()
    for of in (plain, model):
        of.eval()
    assert str(loradash.summary(model)) == str(loradash.summary(plain))
    groups = loradash.dash_parameter_groups(model, lr=1e-3)
    assert [g["names"] for g in groups] == [g["names"] for g in loradash.dash_parameter_groups(plain, lr=1e-3)]
    with loradash.disable(model), loradash.disable(plain):
        torch.testing.assert_close(model(x), plain(x))
    with raises(ValueError, "is sharded (DTensor", "save_adapter"):
        loradash.merge_and_unload(model)
    with raises(ValueError, "sharded"):
        loradash.warm_up(model, rows=[4], progress=False)
    cache = SpectralCache(folder / f"spectra.{meshes.rank}")
    schedule = DashSchedule(model, progress=False, cache=cache)
    for of in (model, plain):
        loradash.prelaunch(of, progress=False, cache=None if of is plain else cache)
    assert schedule.launched
    for name in ("up", "down"):
        ours, theirs = (getattr(of, name) for of in (model, plain))
        assert ours.dash_u.placements == ours.lora_b.placements and ours.dash_vt.placements == ours.lora_a.placements
        torch.testing.assert_close(gathered(ours.dash_u) @ gathered(ours.dash_vt), theirs.dash_u @ theirs.dash_vt)
        with torch.no_grad():
            ours.dash_sigma.fill_(0.3)
            theirs.dash_sigma.fill_(0.3)
    before = model(x)
    torch.testing.assert_close(before, plain(x))
    loradash.merge(model)
    torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-4)
    loradash.unmerge(model)
    assert torch.equal(model(x), before)
    file = loradash.save_adapter(model, folder / f"adapter.{meshes.rank}")
    # Into another degree, and into one process.
    for mesh in (meshes.four, None):
        other = pair() if mesh is None else divided(mesh)
        loradash.load_adapter(other, folder / "adapter.0" / file.name)
        other.eval()
        torch.testing.assert_close(other(x), before)


def refused_layers(meshes: Meshes, folder: Path) -> None:
    """Before anything is divided."""

    def refused(model: nn.Module, mesh: DeviceMesh, *words: str, plan: dict[str, Any] = PLAN) -> None:
        with raises(ValueError, *words):
            parallelize_module(model, mesh, plan)

    refused(pair(), meshes.two_by_two, "up:", "2 dimensions")
    odd = nn.Sequential(nn.Linear(24, 6), nn.Linear(24, 6))
    adapted = apply_dash(odd, DashConfig(r=2, directions=2, dropout=0.1))
    refused(adapted, meshes.four, "0: out_features is 6", "4 processes", plan={"0": ColwiseDash()})
    refused(adapted, meshes.pair, "1: 24 in_features", "parts of 12", "multiple of 8", plan={"1": RowwiseDash()})
    model = pair()
    loradash.merge(model)
    refused(model, meshes.pair, "up is merged", "unmerge")
    refused(divided(meshes.pair), meshes.pair, "up is sharded already")
    model = pair()
    loradash.add_adapter(model, "second", DashConfig(r=2, directions=2))
    refused(model, meshes.pair, "up has parked adapters (second)", "delete_adapter")
    loradash.delete_adapter(model, "second")
    parallelize_module(model, meshes.pair, PLAN)
    whole = Pair()
    whole.up.register_forward_hook(lambda *_: None)
    refused(apply_dash(whole, DashConfig(r=2)), meshes.pair, "up keeps a Linear whole")
    # torch's own style knows nn.Linear alone; ours do with it what torch's do.
    with raises(NotImplementedError, "nn.Linear"):
        parallelize_module(pair(), meshes.pair, {"up": ColwiseParallel()})
    model = parallelize_module(Pair(), meshes.pair, PLAN)
    assert isinstance(model.up.weight, DTensor) and not isinstance(model.up, DashLinear)
    with raises(ValueError, "up: Linear is sharded (DTensor)", "adapt the model first"):
        apply_dash(model, DashConfig(r=2))


def without_adapters(meshes: Meshes, folder: Path) -> None:
    """A layer whose adapters were deleted is divided like any linear layer."""
    model = pair()
    loradash.add_adapter(model, "second", DashConfig(r=2, directions=2, target_modules=["down"]))
    loradash.set_adapter(model, "second")
    loradash.delete_adapter(model, "default")
    assert model.up.adapters == []
    nn.init.normal_(model.down.lora_b)
    wanted = result(model, model, inputs())
    model = parallelize_module(model, meshes.pair, PLAN)
    assert model.up.weight.placements == (Shard(0),)
    assert_same(result(model, model, inputs()), wanted)


def own_plans(meshes: Meshes, folder: Path) -> None:
    """`parallelize` follows the plan that a model of transformers has."""

    def planned(plan: dict[str, str] | None, heads: int = 4) -> nn.Module:
        model = nn.Module()
        model.layers = nn.ModuleList([Pair(), Pair()])
        model.norm = nn.LayerNorm(4)
        model.tp_plan, model.config = plan, type("Config", (), {"num_key_value_heads": heads})()
        return apply_dash(model, DashConfig(r=2, target_modules=["up"]))

    # The norm is left whole, and does not train.
    plan = {"layers.*.up": "colwise", "layers.*.down": "rowwise", "norm": "replicated_with_grad_allreduce"}
    torch.manual_seed(0)
    plain = planned(plan)
    wanted = plain.layers[1](inputs())
    torch.manual_seed(0)
    model = parallelize(planned(plan), meshes.pair)
    assert model.layers[1].up.weight.placements == (Shard(0),) and model.layers[0].down.weight.placements == (Shard(1),)
    torch.testing.assert_close(model.layers[1](inputs()), wanted)
    assert not isinstance(model.norm.weight, DTensor)
    with raises(ValueError, "layers.0.up is sharded already"):
        parallelize(model, meshes.pair)
    half, trained = planned(plan), planned(plan)
    parallelize_module(half, meshes.pair, {"layers.1.down": RowwiseDash()})
    with raises(ValueError, "layers.1.down is sharded already", "without a tp_plan"):
        parallelize(half, meshes.pair)
    assert not isinstance(half.layers[0].up.weight, DTensor)
    trained.norm.requires_grad_()
    tied = planned(plan)
    tied.layers[0].down.weight = tied.layers[1].down.weight
    tied.layers[1].down.weight.requires_grad_()
    for wrong, words in (
        (planned(None), ("no tp_plan", "parallelize_module")),
        (planned({**plan, "layers.*.up": "packed_colwise"}), ("layers.0.up", "packed_colwise")),
        (planned({**plan, "layers.*": "colwise"}), ("layers.0", "a Pair")),
        (planned(plan, heads=3), ("num_key_value_heads is 3",)),
        (trained, ("norm", "a LayerNorm", "does not train")),
        (tied, ("layers.0.down.weight and layers.1.down.weight are one parameter",)),
    ):
        with raises(ValueError, *words):
            parallelize(wrong, meshes.pair)
        assert not any(isinstance(p, DTensor) for p in wrong.parameters())
    with raises(ValueError, "2 dimensions"):
        parallelize(planned(plan), meshes.two_by_two)


CHECKS = (
    degrees,
    layouts,
    checkpointing,
    compiled,
    traffic,
    clipping,
    clipping_of_any_placement,
    functions_of_models,
    refused_layers,
    without_adapters,
    own_plans,
)
