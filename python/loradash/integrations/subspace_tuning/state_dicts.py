"""State dicts of the authors' three code bases and ours, into one another."""

from __future__ import annotations

from collections.abc import Mapping
from typing import get_args

import torch
from torch import Tensor, nn

from ...state import plain_name
from .dialects import INDEX, PARTS, Dialect, Parsed, key_of, narrowed, parse, widened
from .recovery import recovered_directions

Weights = nn.Module | Mapping[str, Tensor]


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
    """U and Vᵀ of a layer whose checkpoint has none: zeros before launch, else from what launch left behind."""
    sigma, delta = parts.get("sigma"), parts.get("delta")
    n, k = parts["lora_b"].shape[0], parts["lora_a"].shape[1]
    if sigma is None or delta is None:
        launched = bool(parts["dash_sigma"].any()) or ("flag" in parts and bool(parts["flag"][1]))
        if launched:
            raise ValueError(
                f"{' and '.join(_vector_keys(parsed, name))} are missing, and lora_change_a and lora_change_bb, from which "
                "they would come back, too"
            )
        return parts["lora_a"].new_zeros(n, s), parts["lora_a"].new_zeros(s, k)
    weight = parsed.rest.get(f"{name}.weight")
    if weight is None:
        weight = _frozen(weights).get(f"{name}.weight")
    if weight is None:
        raise ValueError(f"{' and '.join(_vector_keys(parsed, name))} are missing; give weights= to find them again")
    try:
        u, vt = recovered_directions(weight, sigma, delta, s)
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
