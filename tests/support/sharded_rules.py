"""Calls whose arguments are DTensors, against plain ones: `CHECKS`, each a function of the meshes and a folder."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import loradash
import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.nn import functional as F

from loradash_kernels import GroupMember, dash_experts, dash_linear, dash_linear_group, low_rank_update, sharded
from loradash_kernels.testing import Case, check_error_rule, make_case

from .sharded import Meshes, raises

NAMES = ("x", "weight", "bias", "lora_a", "lora_b", "dash_u", "dash_vt", "dash_sigma")
TRAINED = ("x", "bias", "lora_a", "lora_b", "dash_sigma")
WAYS: dict[str, dict[str, Any]] = {
    "column": {"weight": Shard(0), "bias": Shard(0), "lora_b": Shard(0), "dash_u": Shard(0), "y": Shard(1)},
    "row": {"x": Shard(1), "weight": Shard(1), "lora_a": Shard(1), "dash_vt": Shard(1), "y": Partial()},
    "batch": {"x": Shard(0), "y": Shard(0)},
    "whole": {},
}


def placed(case: Case, mesh: DeviceMesh, ways: tuple[str, ...]) -> dict[str, Any]:
    """The tensors of a case, divided along each dimension of the mesh in a way of `WAYS`."""
    found = {}
    for name in NAMES:
        placements = [WAYS[way].get(name, Replicate()) for way in ways]
        found[name] = distribute_tensor(case.tensors[name].clone(), mesh, placements).requires_grad_(name in TRAINED)
    return found


def options(tensors: dict[str, Any], case: Case) -> dict[str, Any]:
    adapters = {name: t for name, t in tensors.items() if name not in ("x", "weight", "bias", "y")}
    return {**adapters, "scaling": case.scaling, "dropout_p": case.dropout_p}


def judged(case: Case, mesh: DeviceMesh, ways: tuple[str, ...], base: bool) -> None:
    """Output, placement and gradients of one call, by the error rule: of dash_linear, or of low_rank_update."""
    t = placed(case, mesh, ways)
    torch.manual_seed(case.seed)
    placements = tuple(WAYS[way].get("y", Replicate()) for way in ways)
    if base:
        y = dash_linear(t["x"], t["weight"], t["bias"], **options(t, case))
    else:
        first = all(mesh.get_local_rank(d) == 0 for d, way in enumerate(ways) if way == "row")
        whole = F.linear(case.x, case.tensors["weight"], case.tensors["bias"])
        # One of the processes whose parts are summed has the base product.
        plain = [Replicate() if p.is_partial() else p for p in placements]
        local = distribute_tensor(whole, mesh, plain).to_local()
        shape = {"shape": whole.shape, "stride": whole.stride()}
        y0 = DTensor.from_local(local if first else local * 0, mesh, placements, run_check=False, **shape)
        y = low_rank_update(y0, t["x"], **options(t, case))
    assert y.placements == placements, f"{y.placements}, wanted {placements}"
    whole = y.full_tensor()
    whole.backward(case.dy.clone())
    ours = {"y": whole.detach()}
    for name in TRAINED:
        gradient = t[name].grad
        if gradient is None:
            continue
        assert name == "x" or gradient.placements == t[name].placements, f"d{name} is placed {gradient.placements}"
        ours[name] = gradient.full_tensor()
    if base:
        check_error_rule(case, ours)
        return
    # The base product took no part in these gradients.
    torch.manual_seed(case.seed)
    plain = {n: v.clone().requires_grad_(n in TRAINED) for n, v in case.tensors.items()}
    wanted = low_rank_update(
        F.linear(case.x, case.tensors["weight"], case.tensors["bias"]), plain["x"], **options(plain, case)
    )
    wanted.backward(case.dy)
    torch.testing.assert_close(ours.pop("y"), wanted.detach())
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, plain[name].grad, msg=lambda text, name=name: f"{name}: {text}")


def rule_in_one_dimension(meshes: Meshes, folder: Path) -> None:
    """Rows of x and of W that four processes do not divide are shards of different sizes."""
    for way, dropout, base in itertools.product(WAYS, (0.0, 0.3), (True, False)):
        judged(make_case(18, 32, 10, 3, 2, dropout_p=dropout), meshes.four, (way,), base)


def rule_in_two_dimensions(meshes: Meshes, folder: Path) -> None:
    for ways in itertools.product(WAYS, WAYS):
        judged(make_case(12, 32, 20, 3, 2, dropout_p=0.3), meshes.two_by_two, ways, base=True)


def compiled_in_two_dimensions(meshes: Meshes, folder: Path) -> None:
    """One graph, with the mask of one process."""
    case = make_case(12, 32, 20, 3, 2, dropout_p=0.3)

    @torch.no_grad()
    def call(t: dict[str, Any]) -> Any:
        return dash_linear(t["x"], t["weight"], t["bias"], **options(t, case))

    torch.manual_seed(case.seed)
    wanted = call(case.tensors)
    t = placed(case, meshes.two_by_two, ("batch", "row"))
    torch.manual_seed(case.seed)
    y = torch.compile(call, fullgraph=True, backend="aot_eager")(t)
    torch.testing.assert_close(y.full_tensor(), wanted)


def leading_dimensions(meshes: Meshes, folder: Path) -> None:
    """x (batch, length, K): sharded by batch, by columns, or by length where that is a block of rows."""
    case = make_case(24, 16, 8, 3, 2, dropout_p=0.3)
    plain = options(case.tensors, case)
    for shape, placement in (((4, 6, 16), Shard(0)), ((4, 6, 16), Shard(2)), ((1, 24, 16), Shard(1))):
        x = case.x.view(shape)
        torch.manual_seed(1)
        wanted = dash_linear(x, case.tensors["weight"], case.tensors["bias"], **plain)
        row = placement == Shard(2)
        t = placed(case, meshes.pair, ("row" if row else "whole",))
        torch.manual_seed(1)
        y = dash_linear(distribute_tensor(x, meshes.pair, [placement]), t["weight"], t["bias"], **options(t, case))
        assert y.placements == ((Partial() if row else placement),)
        torch.testing.assert_close(y.full_tensor(), wanted)
    t = placed(case, meshes.pair, ("whole",))
    x = distribute_tensor(case.x.view(4, 6, 16), meshes.pair, [Shard(1)])
    with raises(ValueError, "dropout", "dimension 1"):
        dash_linear(x, t["weight"], t["bias"], **options(t, case))
    # Without dropout any part of x will do.
    y = dash_linear(x, t["weight"], t["bias"], **{**options(t, case), "dropout_p": 0.0})
    assert y.placements == (Shard(1),)


def refused_placements(meshes: Meshes, folder: Path) -> None:
    """Every argument of every way in a place where it must not be: named, with its placement; nothing is computed."""
    case = make_case(8, 16, 8, 3, 2)
    for way in WAYS:
        right = placed(case, meshes.pair, (way,))
        for name in NAMES:
            for wrong in (Replicate(), Shard(0), Shard(1), Partial()):
                t = dict(right)
                if wrong == right[name].placements[0] or (wrong == Shard(1) and t[name].dim() == 1):
                    continue
                local = distribute_tensor(case.tensors[name].clone(), meshes.pair, [wrong]).detach()
                t[name] = local.requires_grad_(name in TRAINED)
                tells = ("is placed", "ways to divide")
                # Another x or B may ask for another way, in which another argument is the wrong one.
                tells += () if name in ("x", "lora_b") else (f"{name} is placed {wrong}",)
                # Batch and whole differ by x alone.
                if name == "x" and way in ("batch", "whole") and wrong in (Replicate(), Shard(0)):
                    continue
                with raises(ValueError, *tells):
                    dash_linear(t["x"], t["weight"], t["bias"], **options(t, case))
    t = placed(case, meshes.pair, ("column",))
    for name in ("lora_a", "weight", "x"):
        mixed = {**t, name: case.tensors[name]}
        with raises(ValueError, "is a DTensor", f"{name} a plain tensor", "ColwiseDash"):
            dash_linear(mixed["x"], mixed["weight"], mixed["bias"], **options(mixed, case))
    # A process's part of x, plain, has another K than the whole weight.
    t = placed(case, meshes.pair, ("row",))
    with raises(ValueError, "x a plain tensor", "RowwiseDash"):
        dash_linear(t["x"].to_local(), t["weight"], t["bias"], **options(t, case))
    t = {**t, "lora_b": distribute_tensor(case.tensors["lora_b"], meshes.four, [Replicate()])}
    with raises(ValueError, "lora_b is on", "one mesh"):
        dash_linear(t["x"], t["weight"], t["bias"], **options(t, case))


def refused_operators(meshes: Meshes, folder: Path) -> None:
    """The operators themselves take no DTensor: whoever calls them past the public functions gets an error of DTensor's."""
    case = make_case(8, 16, 8, 3, 2)
    t = placed(case, meshes.pair, ("column",))
    arguments = [t[name].detach() for name in NAMES]
    with raises(NotImplementedError, "loradash.dash_linear", "sharding strategy"):
        torch.ops.loradash.dash_linear(*arguments, None, 1.0, 0, None)
    y = t["x"].new_zeros(8, 8)
    with raises(NotImplementedError, "loradash.low_rank_update", "sharding strategy"):
        torch.ops.loradash.low_rank_update(y, arguments[0], *arguments[3:], None, 1.0, 0, None)
    backward = (y, arguments[0], arguments[1], *arguments[3:], t["x"].new_zeros(8, 5), None, 1.0, 0, [True] * 5, None)
    with raises(NotImplementedError, "loradash.dash_linear_backward", "sharding strategy"):
        torch.ops.loradash.dash_linear_backward(*backward)
    mixed = [t["x"].to_local().detach(), *arguments[1:]]
    with raises(RuntimeError, "mixed torch.Tensor and DTensor"):
        torch.ops.loradash.dash_linear(*mixed, None, 1.0, 0, None)


def refused_functions(meshes: Meshes, folder: Path) -> None:
    """Functions that have no rule, with DTensors for all arguments or for some."""
    case = make_case(8, 16, 8, 3, 2)
    whole = placed(case, meshes.pair, ("whole",))
    for t in (whole, {**case.tensors, "weight": whole["weight"]}, {**whole, "x": case.x}):
        named = "x" if t is whole else "weight"
        adapters = {name: t[name] for name in NAMES[3:]}
        member = GroupMember(weight=t["weight"], bias=t["bias"], **adapters)
        with raises(ValueError, f"{named}", "of a group is a DTensor"):
            dash_linear_group(t["x"], [member, member])
        stacked = {name: tensor.unsqueeze(0) for name, tensor in adapters.items()}
        with raises(ValueError, f"{named}", "of experts is a DTensor"):
            dash_experts(t["x"], t["weight"].unsqueeze(0), torch.tensor([8]), **stacked)


def window_of_eight(meshes: Meshes, folder: Path) -> None:
    """One draw of the mask serves eight neighbours: where a part of K begins between them, dropout is refused."""
    case = make_case(8, 24, 8, 3, 2, dropout_p=0.3)
    t = placed(case, meshes.pair, ("row",))
    with raises(ValueError, "parts of 12 columns", "multiple of 8"):
        dash_linear(t["x"], t["weight"], t["bias"], **options(t, case))


def differing_seeds(meshes: Meshes, folder: Path) -> None:
    """Found in the first call; and later ones before anything is saved."""
    case = make_case(8, 16, 8, 3, 2, dropout_p=0.3)
    t = placed(case, meshes.pair, ("row",))
    sharded._WATCHES.clear()
    ours = nn.ParameterList([t["lora_a"]])

    def call(t: dict[str, Any] = t) -> None:
        dash_linear(t["x"], t["weight"], t["bias"], **options(t, case))

    torch.manual_seed(meshes.rank)
    with raises(RuntimeError, "drew different seeds", "torch.manual_seed"):
        call()
    torch.manual_seed(5)
    for _ in range(4):
        call()
    torch.rand(meshes.rank)
    # The sixth and seventh call wait for the eighth.
    for _ in range(2):
        call()
    with raises(RuntimeError, "drew different seeds"):
        loradash.distributed.reshard(ours)
    torch.manual_seed(meshes.rank // 2)
    # Data-parallel groups draw masks of their own.
    call()
    loradash.distributed.reshard(ours)
    # A call more in one process is told like another seed.
    sharded._WATCHES.clear()
    for _ in range(3 + meshes.rank % 2):
        sharded._WATCHES.setdefault((meshes.pair.get_group().group_name,), sharded._Watch()).waiting.append(
            torch.ones(2).long()
        )
    with raises(RuntimeError, "drew different seeds"):
        loradash.distributed.reshard(ours)
    # What other meshes have to compare takes processes that a model of this one does not have.
    four = placed(case, meshes.four, ("whole",))
    torch.manual_seed(7)
    for _ in range(3):
        call(four)
    if meshes.rank < 2:
        loradash.distributed.reshard(ours)
        assert sharded._WATCHES[(meshes.four.get_group().group_name,)].waiting
    loradash.distributed.reshard(nn.ParameterList([four["lora_a"]]))


def second_derivatives(meshes: Meshes, folder: Path) -> None:
    """Refused, for whatever argument: DTensor itself gives wrong ones."""
    case = make_case(8, 16, 8, 3, 2)
    t = placed(case, meshes.pair, ("row",))
    for name in TRAINED:
        y = dash_linear(t["x"], t["weight"], t["bias"], **options(t, case)).full_tensor()
        with raises(RuntimeError, "second derivatives are not implemented"):
            torch.autograd.grad(y.square().sum(), t[name], create_graph=True)


CHECKS = (
    rule_in_one_dimension,
    rule_in_two_dimensions,
    compiled_in_two_dimensions,
    leading_dimensions,
    refused_placements,
    refused_operators,
    refused_functions,
    window_of_eight,
    differing_seeds,
    second_derivatives,
)
