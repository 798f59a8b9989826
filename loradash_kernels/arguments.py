"""The arguments of the public functions: what is taken, and the errors that name what is not."""

from __future__ import annotations

import torch
from torch import Tensor

from .sharded import refuse_mixed

_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_DENSE = torch.strided


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype to which autocast takes tensors on the device of x, or None."""
    if not torch._C._is_any_autocast_enabled():
        return None
    device = x.device.type
    on = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if on else None


def autocast(t: Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    """t as autocast gives it to `nn.functional.linear`: cast from a floating dtype other than float64, on this device."""
    eligible = t.dtype.is_floating_point and t.dtype != torch.float64 and t.device.type == device.type
    return t.to(dtype) if eligible else t


def autocast_base(
    x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor | None]:
    """`autocast` of the arguments of the base product."""
    device = x.device
    cast = None if bias is None else autocast(bias, dtype, device)
    return autocast(x, dtype, device), autocast(weight, dtype, device), cast


def check_base(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Checks weight and bias, the arguments of the base product; x has passed `check_adapters`."""
    if weight.requires_grad:
        raise ValueError(
            "weight requires grad; the base weight of a LoRA-Dash layer is frozen: weight.requires_grad_(False)"
        )
    if weight.dtype != x.dtype:
        raise ValueError(f"weight is {weight.dtype}, x is {x.dtype}; they must be of one dtype")
    if weight.device != x.device or weight.layout is not _DENSE:
        raise _misplaced("weight", weight, x)
    if bias is None:
        return
    if bias.shape != weight.shape[:1] or bias.dtype != x.dtype:
        raise ValueError(
            f"bias has shape {tuple(bias.shape)} and dtype {bias.dtype}; wanted ({weight.shape[0]},) and {x.dtype}"
        )
    if bias.device != x.device or bias.layout is not _DENSE:
        raise _misplaced("bias", bias, x)


def check_sum(y: Tensor, x: Tensor) -> None:
    """Checks y (..., N), the output of a base layer, beside x, which has passed `check_adapters`."""
    if y.dtype != x.dtype:
        raise ValueError(f"y is {y.dtype}, x is {x.dtype}; they must be of one dtype")
    if y.device != x.device or y.layout is not _DENSE:
        raise _misplaced("y", y, x)
    if y.shape[:-1] != x.shape[:-1]:
        raise ValueError(
            f"y has shape {tuple(y.shape)}, x {tuple(x.shape)}; they must agree but for the last dimension"
        )


def _misplaced(name: str, t: Tensor, x: Tensor) -> ValueError:
    if t.device != x.device:
        return ValueError(f"{name} is on {t.device}, x is on {x.device}; they must be on one device")
    return ValueError(f"{name} has the layout {t.layout}; wanted a dense tensor: {name}.to_dense()")


def check_adapters(
    x: Tensor,
    weight_shape: torch.Size | tuple[int, int],
    lora_a: Tensor,
    lora_b: Tensor,
    dash_u: Tensor | None,
    dash_vt: Tensor | None,
    dash_sigma: Tensor | None,
) -> None:
    """Checks x, and the adapters of a base layer of this shape (N, K)."""
    if x.is_nested or x.layout is not _DENSE:
        raise ValueError(f"x is a nested tensor or of the layout {x.layout}; wanted a dense tensor (..., K)")
    if x.dim() == 0 or x.dtype not in _FLOATS:
        raise ValueError(f"x has shape {tuple(x.shape)} and dtype {x.dtype}; wanted (..., K) of a floating dtype")
    if len(weight_shape) != 2 or weight_shape[1] != x.shape[-1]:
        # A process's part of x has another K.
        refuse_mixed({"x": x, "lora_a": lora_a, "lora_b": lora_b})
        raise ValueError(f"weight has shape {tuple(weight_shape)}; wanted (N, {x.shape[-1]}) for x {tuple(x.shape)}")
    n, k = weight_shape
    if lora_a.dim() != 2 or lora_a.shape[1] != k:
        raise ValueError(f"lora_a has shape {tuple(lora_a.shape)}; wanted (r, {k})")
    if lora_b.shape != (n, lora_a.shape[0]):
        raise ValueError(f"lora_b has shape {tuple(lora_b.shape)}; wanted ({n}, {lora_a.shape[0]})")
    adapters = [("lora_a", lora_a), ("lora_b", lora_b)]
    if dash_u is not None and dash_vt is not None and dash_sigma is not None:
        s = dash_sigma.numel()
        if dash_u.shape != (n, s) or dash_vt.shape != (s, k) or dash_sigma.dim() != 1:
            shapes = tuple(dash_u.shape), tuple(dash_vt.shape), tuple(dash_sigma.shape)
            raise ValueError(
                f"dash_u, dash_vt and dash_sigma have shapes {shapes}; wanted ({n}, s), (s, {k}) and (s,) of one s"
            )
        if dash_u.requires_grad or dash_vt.requires_grad:
            name = "dash_u" if dash_u.requires_grad else "dash_vt"
            raise ValueError(f"{name} requires grad; directions are frozen: {name}.requires_grad_(False)")
        adapters += [("dash_u", dash_u), ("dash_vt", dash_vt), ("dash_sigma", dash_sigma)]
    elif dash_u is not None or dash_vt is not None or dash_sigma is not None:
        raise ValueError("dash_u, dash_vt and dash_sigma go together: pass all three or none")
    device = x.device
    for name, t in adapters:
        if t.dtype not in _FLOATS or t.device != device or t.layout is not _DENSE:
            if t.layout is not _DENSE:
                raise _misplaced(name, t, x)
            raise ValueError(f"{name} is {t.dtype} on {t.device}; wanted a floating dtype on {device}")
