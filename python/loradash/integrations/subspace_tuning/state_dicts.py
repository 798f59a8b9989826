"""State dicts of the authors' three code bases and ours, into one another, and the directions that theirs may have lost."""

from __future__ import annotations

from collections.abc import Mapping
from typing import get_args

import torch
from torch import Tensor, nn

from ...state import plain_name
from .dialects import INDEX, PARTS, Dialect, Parsed, key_of, narrowed, parse, widened

Weights = nn.Module | Mapping[str, Tensor]

ROUNDING = 1e-3
"""How far singular values may be from the file's, relative to the largest: two SVDs in float32 differ by far less, another
weight's by far more."""


def convert_state_dict(
    state_dict: Mapping[str, Tensor], into: Dialect, *, adapter: str = "default", weights: Weights | None = None
) -> dict[str, Tensor]:
    """The state dict of a model with layers of one kind, as that of a model with layers of another.

    Keys of adapters and, for SdG's fork, of the layers that it wraps are renamed; prefixes of PEFT, which are the wrapped
    model's own, are taken off. All other tensors pass.

    Args:
        adapter: the name that SdG's fork gives the adapter.
        weights: as for `convert`, where the state dict holds neither U and V nor the weights.

    Raises ValueError, naming the key, for what does not fit.
    """
    if into not in get_args(Dialect):
        raise ValueError(f"into must be one of {get_args(Dialect)}, got {into!r}")
    parsed = parse(state_dict)
    layers = parts_of(parsed, weights)
    rest = {_plain_key(parsed, key): tensor for key, tensor in parsed.rest.items() if ".original_module." not in key}
    if into == "sdg":
        for name in layers:
            for key in ("weight", "bias"):
                if f"{name}.{key}" in rest:
                    rest[f"{name}.base_layer.{key}"] = rest.pop(f"{name}.{key}")
    return rest | named(layers, into, adapter if into == "sdg" else None)


def _plain_key(parsed: Parsed, key: str) -> str:
    """A key of what is no adapter without the names of wrappers that SdG's fork put around modules."""
    if parsed.dialect != "sdg":
        return key
    for name in parsed.layers:
        key = key.replace(f"{name}.base_layer.", f"{name}.") if key.startswith(f"{name}.base_layer.") else key
    return key.replace(f".modules_to_save.{parsed.adapter}.", ".")


def parts_of(parsed: Parsed, weights: Weights | None) -> dict[str, dict[str, Tensor]]:
    """Every layer's tensors in our shapes, with U, V and `launched`; a layer without directions has A and B alone."""
    layers: dict[str, dict[str, Tensor]] = {}
    for name, parts in parsed.layers.items():
        found = {part: parts[part] for part in ("lora_a", "lora_b")}
        for part, tensor in found.items():
            if tensor.dim() != 2:
                raise ValueError(f"{parsed.keys[name, part]} has shape {tuple(tensor.shape)}, wanted a matrix")
        n, k = parts["lora_b"].shape[0], parts["lora_a"].shape[1]
        if not parts.get("dash_sigma", parts["lora_a"][:0]).numel():
            layers[name] = found
            continue
        if ("dash_u" in parts) != ("dash_vt" in parts):
            raise ValueError(f"{name} has one of {' and '.join(_vector_keys(parsed, name))} without the other")
        s = min(n, k, parts["dash_sigma"].numel())
        if "dash_u" in parts:
            found |= {part: parts[part] for part in ("dash_u", "dash_vt")}
        else:
            found["dash_u"], found["dash_vt"] = _lost(parsed, name, parts, weights, s)
        found["dash_sigma"] = parts["dash_sigma"]
        found = {part: narrowed(parsed.keys.get((name, part), name), part, t, s) for part, t in found.items()}
        _check_shapes(parsed, name, found, n, k, s)
        flag = parts.get("launched", parts["flag"][1] if "flag" in parts else found["dash_u"].any())
        found["launched"] = flag.to(torch.bool).reshape(())
        layers[name] = found
    if not any("dash_sigma" in parts for parts in layers.values()):
        raise ValueError(
            f"holds no directions ({key_of(parsed.dialect, 'LAYER', 'dash_sigma', parsed.adapter)}): plain LoRA"
        )
    return layers


def _vector_keys(parsed: Parsed, name: str) -> list[str]:
    return [key_of(parsed.dialect, name, part, parsed.adapter) for part in ("dash_u", "dash_vt")]


def _check_shapes(parsed: Parsed, name: str, parts: Mapping[str, Tensor], n: int, k: int, s: int) -> None:
    r = parts["lora_a"].shape[0]
    wanted = {"lora_a": (r, k), "lora_b": (n, r), "dash_sigma": (s,), "dash_u": (n, s), "dash_vt": (s, k)}
    for part, shape in wanted.items():
        if tuple(parts[part].shape) != shape:
            key = parsed.keys.get((name, part), f"{name}.{part}")
            raise ValueError(f"{key} has shape {tuple(parts[part].shape)}, wanted {shape}")


def _lost(
    parsed: Parsed, name: str, parts: Mapping[str, Tensor], weights: Weights | None, s: int
) -> tuple[Tensor, Tensor]:
    key = f"{name}.weight"
    weight = parsed.rest[key] if key in parsed.rest else _frozen(weights).get(key)
    try:
        u, vt = lost_directions(parts, weight, s, " and ".join(_vector_keys(parsed, name)))
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    return u.to(parts["lora_a"]), vt.to(parts["lora_a"])


def _frozen(weights: Weights | None) -> Mapping[str, Tensor]:
    if weights is None or isinstance(weights, Mapping):
        return weights or {}
    return {plain_name(key): tensor for key, tensor in weights.state_dict().items()}


def named(layers: Mapping[str, Mapping[str, Tensor]], dialect: Dialect, adapter: str | None) -> dict[str, Tensor]:
    """The layers' tensors under the keys, and in the shapes, of a dialect."""
    tensors: dict[str, Tensor] = {}
    for name, parts in layers.items():
        if dialect != "loradash" and "dash_sigma" not in parts and dialect != "sdg":
            raise ValueError(f"{name} has no directions: these classes have {INDEX} in every layer")
        for part, tensor in parts.items():
            if part in PARTS and dialect != "loradash":
                try:
                    tensor = widened(part, tensor)
                except ValueError as error:
                    raise ValueError(f"{name}: {error}") from error
                tensor = tensor[None] if part == "dash_sigma" and dialect != "loralib" else tensor
            if part in PARTS or dialect == "loradash":
                tensors[key_of(dialect, name, part, adapter)] = tensor.contiguous()
        if dialect == "loradash" and "dash_sigma" not in parts:
            n, k = parts["lora_b"].shape[0], parts["lora_a"].shape[1]
            new = parts["lora_a"].new_zeros
            for part, shape in {"dash_sigma": (0,), "dash_u": (n, 0), "dash_vt": (0, k)}.items():
                tensors[key_of(dialect, name, part)] = new(shape)
            tensors[key_of(dialect, name, "launched")] = torch.tensor(False)
    return tensors


def lost_directions(parts: Mapping[str, Tensor], weight: Tensor | None, s: int, names: str) -> tuple[Tensor, Tensor]:
    """U (N, s) and Vᵀ (s, K) of a layer whose state dict has none, as the authors' `lora_state_dict` writes them: zeros before
    launch, else from "sigma" and "delta", what launch left behind.

    names: theirs of U and V, for error messages. Raises ValueError where they cannot be found again.
    """
    if "sigma" in parts and "delta" in parts:
        if weight is None:
            raise ValueError(f"{names} are missing; give weights= to find them again")
        return recovered_directions(weight, parts["sigma"], parts["delta"], s)
    if bool(parts["dash_sigma"].any()) or ("flag" in parts and bool(parts["flag"][1])):
        raise ValueError(
            f"{names} are missing in the state dict of a launched layer, and so are lora_change_a and lora_change_bb, from which "
            "they would come back; loradash.integrations.subspace_tuning.lora_state_dict keeps them"
        )
    new = parts["lora_a"].new_zeros
    return new(parts["lora_b"].shape[0], s), new(s, parts["lora_a"].shape[1])


@torch.no_grad()
def recovered_directions(
    weight: Tensor,  # as the layer stores it
    sigma: Tensor,  # (n,)
    delta: Tensor,  # (n,)
    s: int,
) -> tuple[Tensor, Tensor]:
    """U (N, s) and Vᵀ (s, K) of the s highest |delta| / |sigma|, from the SVD of the frozen weight, in their order.

    sigma and delta are `lora_change_a` and `lora_change_bb`, what the authors' launch leaves behind. Raises ValueError where
    the weight has other singular values: it is not the one that the checkpoint was trained on.
    """
    u, found, vt = torch.linalg.svd(weight.detach().float(), full_matrices=False)
    if found.shape != sigma.shape or delta.shape != sigma.shape:
        raise ValueError(
            f"lora_change_a {tuple(sigma.shape)} and lora_change_bb {tuple(delta.shape)} do not fit a weight "
            f"{tuple(weight.shape)}"
        )
    sigma, delta = sigma.to(found), delta.to(found)
    gap = float((found - sigma).abs().max() / found[0].clamp_min(torch.finfo(found.dtype).tiny))
    if not gap < ROUNDING:
        raise ValueError(
            f"lora_change_a are not the singular values of this weight (off by {gap:.1e} of the largest); give the weights "
            "that the checkpoint was trained on"
        )
    which = torch.topk(delta.abs() / sigma.abs(), s).indices
    return u[:, which].contiguous(), vt[which].contiguous()
