"""Tensor parallelism: styles for torch's `parallelize_module` that divide adapted layers.

    model = apply_dash(model, config)
    plan = {"layers.*.up": ColwiseDash(), "layers.*.down": RowwiseDash()}
    model = parallelize_module(model, mesh["tp"], plan)

A style applies to what torch's own of that kind applies to, and to adapted layers: one plan serves both. Optimizers are made
afterwards, and `fully_shard` comes afterwards. docs/tensor-parallel.md says what is sharded where, and what it costs.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel, parallelize_module

from loradash_kernels.sharded import COLUMN, ROW, Way, placement

from .distributed import gathered, is_sharded
from .linear import DashLinear
from .quantised import is_quantised
from .state import plain_name, unwrap

_PARAMETERS = ("weight", "bias", "lora_a", "lora_b", "dash_sigma")
_BUFFERS = ("dash_u", "dash_vt")


class ColwiseDash(ColwiseParallel):
    """Divides a layer by its outputs: W, bias, B and U by rows (N); A, Vᵀ and Δσ are whole in every process.

    On nn.Linear and nn.Embedding it is torch's ColwiseParallel.

    Args:
        input_layouts: of x, where it is given as a plain tensor; Replicate() by default, Shard(1) after a sequence-parallel
            norm.
        output_layouts: of y; Shard(-1) by default.
        use_local_output: give y as a plain tensor, this process's part?

    `parallelize_module` raises ValueError, naming the layer, for one that is kept whole (quantised, hooked), merged, or
    sharded already, for N that the processes do not divide, and for a mesh of several dimensions.
    """

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        if not isinstance(module, DashLinear):
            return super()._apply(module, device_mesh)
        return _divide(module, device_mesh, COLUMN, self, (Replicate(),))


class RowwiseDash(RowwiseParallel):
    """Divides a layer by its inputs: W, A and Vᵀ by columns (K); bias, B, U and Δσ are whole in every process.

    On nn.Linear and nn.Embedding it is torch's RowwiseParallel.

    Args:
        input_layouts: of x, where it is given as a plain tensor; Shard(-1) by default, what ColwiseDash gives.
        output_layouts: of y; Replicate() by default, Shard(1) before a sequence-parallel norm.
        use_local_output: give y as a plain tensor, this process's part?

    `parallelize_module` raises ValueError as for `ColwiseDash`, here for K; with dropout each process's part of K must be a
    multiple of 8, since one draw of the mask serves eight neighbours.
    """

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        if not isinstance(module, DashLinear):
            return super()._apply(module, device_mesh)
        return _divide(module, device_mesh, ROW, self, (Shard(-1),))


def _divide(layer: DashLinear, mesh: DeviceMesh, way: Way, style: Any, desired: tuple[Placement, ...]) -> DashLinear:
    """Distributes an adapted layer's tensors, and has its calls take and give what the style says."""
    _check(layer, mesh, way)
    for name in (*_PARAMETERS, *_BUFFERS):
        # A layer whose adapters were all deleted has its weight and bias alone.
        tensor = getattr(layer, name, None)
        if tensor is not None:
            place = way.places.get(name)
            if name == "weight" and layer.transposed and place is not None:
                place = 1 - int(place)
            parts = distribute_tensor(
                tensor.detach(), mesh, [placement(place, tensor.dim())], src_data_rank=style.src_data_rank
            )
            if name in _BUFFERS:
                setattr(layer, name, parts)
            else:
                layer.register_parameter(name, nn.Parameter(parts, requires_grad=tensor.requires_grad))
    layer.register_forward_pre_hook(functools.partial(_take, mesh, style.input_layouts, desired))
    layer.register_forward_hook(functools.partial(_give, style.output_layouts, style.use_local_output))
    return layer


def _check(layer: DashLinear, mesh: DeviceMesh, way: Way) -> None:
    """Raises ValueError where a layer cannot be divided this way."""
    label, parts = layer.name or type(layer).__name__, mesh.size()
    if mesh.ndim != 1:
        raise ValueError(f'{label}: the mesh has {mesh.ndim} dimensions; wanted one, as mesh["tp"] gives it')
    if layer.base is not None:
        raise ValueError(
            f"{label} keeps a {type(layer.base).__name__} whole (docs/layers.md), which computes in a way of its own and cannot be "
            "divided; leave it out of the plan, or out of the adapters (exclude_modules)"
        )
    if layer.merged:
        raise ValueError(f"{label} is merged; unmerge(model) before parallelize_module")
    if "weight" not in layer._parameters or is_quantised(layer.weight):
        raise ValueError(f"{label}: its weight is computed or quantised, and cannot be divided")
    parked = [name for name, _ in layer.parked_adapters()]
    if parked:
        raise ValueError(
            f"{label} has parked adapters ({', '.join(parked)}), which nobody could activate or save once the layer is divided: "
            "divide a model of one adapter; save the others, and delete_adapter(model, name)"
        )
    if any(is_sharded(p) for p in layer.parameters()):
        raise ValueError(f"{label} is sharded already (DTensor); parallelize_module comes before fully_shard, and once")
    size, what = (layer.out_features, "out_features") if way is COLUMN else (layer.in_features, "in_features")
    if size % parts:
        raise ValueError(f"{label}: {what} is {size}, which {parts} processes do not divide into equal parts")
    if way is ROW and layer.config.dropout and size // parts % 8:
        raise ValueError(
            f"{label}: {size} in_features over {parts} processes are parts of {size // parts}; with dropout wanted a multiple of 8, "
            "the neighbours that share a draw of the mask"
        )


def _like(layouts: Sequence[Placement], dims: int) -> tuple[Placement, ...]:
    """Placements with dimensions counted from the front."""
    return tuple(Shard(p.dim % dims) if type(p) is Shard else p for p in layouts)


def _take(
    mesh: DeviceMesh, given: Sequence[Placement], desired: Sequence[Placement], layer: nn.Module, args: tuple[Any, ...]
) -> tuple[Any, ...]:
    """Before a call: x as a DTensor, placed as the layer wants it."""
    if not args or not isinstance(args[0], Tensor):
        return args
    x, dims = args[0], args[0].dim()
    if not isinstance(x, DTensor):
        x = DTensor.from_local(x, mesh, _like(given, dims), run_check=False)
    wanted = _like(desired, dims)
    if tuple(x.placements) != wanted:
        x = x.redistribute(placements=wanted)
    return (x, *args[1:])


def _give(wanted: Sequence[Placement], local: bool, layer: nn.Module, args: tuple[Any, ...], y: Any) -> Any:
    """After a call: y placed as the style says."""
    placed = _like(wanted, y.dim())
    if tuple(y.placements) != placed:
        y = y.redistribute(placements=placed)
    return y.to_local() if local else y


# The names of transformers' styles, which this file has its own for.
_STYLES: dict[str, Callable[[], ParallelStyle]] = {
    "colwise": ColwiseDash,
    "colwise_rep": lambda: ColwiseDash(output_layouts=Replicate()),
    "colwise_gather_output": lambda: ColwiseDash(output_layouts=Replicate()),
    "rowwise": RowwiseDash,
    "rowwise_rep": lambda: RowwiseDash(input_layouts=Replicate()),
    "embedding_rowwise": lambda: RowwiseParallel(input_layouts=Replicate()),
}
# What transformers does with the gradients of a module that it leaves whole, and whose input it does not.
_WHOLE = "replicated_with_grad_allreduce"
_HEADS = ("num_attention_heads", "num_key_value_heads")


def parallelize(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    """Divides a transformers model by its own `tp_plan`, adapted layers and others, in place. Returns the model.

    The model is loaded whole (without transformers' own tp_plan argument), adapted, and then divided.

    Args:
        mesh: of one dimension: mesh["tp"] of a larger one.

    Raises ValueError, with the model unchanged: no plan, a style in it that only transformers has, a module divided already, heads that the processes do
    not divide, a trained parameter tied between modules that it divides, and what `ColwiseDash` and `RowwiseDash` refuse.
    """
    root = unwrap(model)
    plan = getattr(root, "tp_plan", None)
    if not plan:
        raise ValueError(
            f"{type(root).__name__} has no tp_plan; say which layer is divided how: parallelize_module(model, mesh, plan)"
        )
    if mesh.ndim != 1:
        raise ValueError(f'the mesh has {mesh.ndim} dimensions; wanted one, as mesh["tp"] gives it')
    config = getattr(root.config, "get_text_config", lambda: root.config)()
    for name in _HEADS:
        heads = getattr(config, name, None)
        if heads is not None and heads % mesh.size():
            raise ValueError(f"{name} is {heads}, which {mesh.size()} processes do not divide into equal parts")
    chosen = {
        name: style for name, module in root.named_modules() if (style := _style_in(plan, plain_name(name), module))
    }
    for name, style in chosen.items():
        _check_planned(name, root.get_submodule(name), style, mesh)
    _check_ties(root, chosen)
    parallelize_module(root, mesh, {name: _STYLES[style]() for name, style in chosen.items()})
    return model


def _style_in(plan: Mapping[str, str], name: str, module: nn.Module) -> str | None:
    """The style of a module, whose plan writes * for a layer's number; None for one that the plan does not touch."""
    style = plan.get(re.sub(r"\.\d+(?=\.|$)", ".*", name))
    frozen = not any(p.requires_grad for p in module.parameters())
    return None if style == _WHOLE and frozen else style


def _check_planned(name: str, module: nn.Module, style: str, mesh: DeviceMesh) -> None:
    """Raises ValueError where a module cannot be divided as the model's plan says."""
    if style not in _STYLES or not isinstance(module, (DashLinear, nn.Linear, nn.Embedding)):
        raise ValueError(
            f"{name}: the model's tp_plan divides it, a {type(module).__name__}, as {style!r}; wanted one of {sorted(_STYLES)} "
            f"for a linear layer, adapted by apply_dash or not, or an embedding; or {_WHOLE!r} for what does not train"
        )
    if isinstance(module, DashLinear):
        _check(module, mesh, ROW if style.startswith("rowwise") else COLUMN)
    elif any(map(is_sharded, module.parameters())):
        raise ValueError(f"{name} is sharded already (DTensor); load the model whole, without a tp_plan of its own")


def _check_ties(root: nn.Module, chosen: Mapping[str, str]) -> None:
    """A tied parameter becomes one parameter of each module that is divided: frozen they stay equal, trained they would not."""
    owners: dict[int, list[str]] = {}
    for name, parameter in root.named_parameters(remove_duplicate=False):
        if parameter.requires_grad:
            owners.setdefault(id(parameter), []).append(name)
    for names in owners.values():
        if len(names) > 1 and any(name.rpartition(".")[0] in chosen for name in names):
            raise ValueError(
                f"{' and '.join(names)} are one parameter, which trains and which the model's tp_plan would part; freeze it, or untie it"
            )


@torch.no_grad()
def clip_grad_norm_(
    parameters: Tensor | Iterable[Tensor], max_norm: float, norm_type: float = 2.0, error_if_nonfinite: bool = False
) -> Tensor:
    """torch.nn.utils.clip_grad_norm_ for gradients of which some are plain tensors and some DTensors, of one mesh or several.

    torch's own takes gradients of one kind alone: it raises where a module that trains as a whole is not divided beside
    layers that are, or where `fully_shard` comes after a plan that leaves some modules out. Every process must call this.

    Returns the norm of all gradients together, a plain tensor (); RuntimeError where it is not finite and
    `error_if_nonfinite`, in all processes, with nothing changed.
    """
    kinds: dict[Any, list[Tensor]] = {}
    for parameter in [parameters] if isinstance(parameters, Tensor) else parameters:
        if parameter.grad is not None:
            kinds.setdefault(getattr(parameter.grad, "device_mesh", None), []).append(parameter.grad)
    norms = [nn.utils.get_total_norm(gradients, norm_type) for gradients in kinds.values()]
    if not norms:
        return torch.tensor(0.0)
    whole = [gathered(norm) for norm in norms]
    total = torch.linalg.vector_norm(torch.stack([norm.to(whole[0].device) for norm in whole]), norm_type)
    if error_if_nonfinite and not bool(total.isfinite()):
        raise RuntimeError(f"the norm of order {norm_type} of the gradients is {float(total)}, which cannot be clipped")
    factor = (max_norm / (total + 1e-6)).clamp(max=1.0)
    for gradients in kinds.values():
        for gradient in gradients:
            local = gradient.to_local() if isinstance(gradient, DTensor) else gradient
            local.mul_(factor.to(local.device))
    return total
