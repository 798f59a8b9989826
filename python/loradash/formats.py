"""Formats of quantised linear layers: the weight that each stands for, read where it lies, and a new one in its place.

A layer is known by the names of its classes, so that no framework is imported here before a layer of its own is seen. What
is read is read without calling the layer, whose forward may write to it: bitsandbytes' settle a compute dtype, change the
dtype of the bias and repack the codes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


class Format:
    """How the layers of one format keep their weight."""

    def weight(self, layer: Any) -> Tensor:
        """W (N, K), a new tensor, as the format itself defines it."""
        raise NotImplementedError

    def product(self, layer: Any, x: Tensor) -> Tensor | None:
        """x Wᵀ by the kernels that the layer's forward uses, without its bias; None where only the forward has them."""
        return None

    def refusal(self, layer: Any) -> str | None:
        """Why no other weight can be quantised for this layer, or None."""
        return None

    def requantised(self, layer: Any, weight: Tensor) -> dict[str, Any]:
        """The layer's attributes, by name, with another weight (N, K). `refusal` was asked before."""
        raise NotImplementedError(self.refusal(layer))


class FourBit(Format):
    """bitsandbytes' Linear4bit."""

    def weight(self, layer: Any) -> Tensor:
        codes, state = _unpacked(layer.weight)
        return _bitsandbytes().functional.dequantize_4bit(codes, state)

    def product(self, layer: Any, x: Tensor) -> Tensor:
        codes, state = _unpacked(layer.weight)
        # Old releases want the codes as a column turned into a row; new ones take either.
        return _bitsandbytes().matmul_4bit(x, codes.t(), quant_state=state)

    def requantised(self, layer: Any, weight: Tensor) -> dict[str, Any]:
        old = layer.weight
        codes, state = _bitsandbytes().functional.quantize_4bit(
            weight.to(old.quant_state.dtype).contiguous(),
            blocksize=old.quant_state.blocksize,
            compress_statistics=old.quant_state.nested,
            quant_type=old.quant_state.quant_type,
            quant_storage=old.dtype,
        )
        new = copy.copy(old)
        new.data, new.quant_state = codes, state
        return {"weight": new, "quant_state": state}


class EightBit(Format):
    """bitsandbytes' Linear8bitLt whose codes are kept (has_fp16_weights=False)."""

    def weight(self, layer: Any) -> Tensor:
        codes, scale = _codes(layer)
        return _bitsandbytes().functional.int8_vectorwise_dequant(codes, scale)

    def product(self, layer: Any, x: Tensor) -> Tensor:
        state = copy.copy(layer.state)
        state.CB, state.SCB = _codes(layer)
        return _bitsandbytes().matmul(x.half(), layer.weight.detach(), state=state)

    def requantised(self, layer: Any, weight: Tensor) -> dict[str, Any]:
        bnb = _bitsandbytes()
        codes, scale, _ = bnb.functional.int8_vectorwise_quant(weight.half().contiguous())
        state = copy.copy(layer.state)
        state.CB = state.SCB = None
        new = bnb.nn.Int8Params(codes, requires_grad=False, has_fp16_weights=False, CB=codes, SCB=scale)
        return {"weight": new, "state": state}


class TorchAO(Format):
    """nn.Linear whose weight is one of torchao's tensors."""

    def weight(self, layer: Any) -> Tensor:
        return layer.weight.dequantize()

    def product(self, layer: Any, x: Tensor) -> Tensor:
        return F.linear(x.to(layer.weight.dtype), layer.weight)

    def refusal(self, layer: Any) -> str | None:
        old = layer.weight
        kind = type(old).__name__
        if kind not in _MAKERS or getattr(old, "act_pre_scale", None) is not None:
            return f"a new {kind} of torchao's cannot be made from an old one"
        blocks = tuple(old.block_size)
        if len(blocks) != 2 or (blocks[0] != 1 and blocks != tuple(old.shape)):
            return f"a {kind} in blocks of {blocks} cannot be made anew"
        return None

    def requantised(self, layer: Any, weight: Tensor) -> dict[str, Any]:
        make = _MAKERS[type(layer.weight).__name__]
        made = make(layer.weight, weight.to(layer.weight.dtype).contiguous())
        return {"weight": nn.Parameter(made, requires_grad=False)}


class FineGrainedFP8(Format):
    """transformers' FP8Linear."""

    def weight(self, layer: Any) -> Tensor:
        from transformers.integrations import finegrained_fp8

        # This is what the layer's own backward pass multiplies by.
        return finegrained_fp8._dequantize_fp8_weight(
            layer.weight.detach(), layer.weight_scale_inv.detach(), layer.block_size, torch.float32
        )

    def refusal(self, layer: Any) -> str:
        return "transformers quantises weights to FP8 at load time alone"


class BitNet(Format):
    """transformers' AutoBitLinear whose weight is ternary already (quantization_mode "offline")."""

    def weight(self, layer: Any) -> Tensor:
        return layer.weight.detach().float() * layer.weight_scale.float()

    def product(self, layer: Any, x: Tensor) -> Tensor:
        return F.linear(x, layer.weight.float()) * layer.weight_scale.float()

    def refusal(self, layer: Any) -> str:
        return "ternary weights have no room for an update"


def format_of(layer: nn.Module) -> Format | None:
    """The format of a quantised layer that computes as its class does; None for any other, and where the codes are not here."""
    weight = getattr(layer, "weight", None)
    if not isinstance(weight, Tensor) or weight.is_meta:
        return None
    patched = "forward" in vars(layer) and "_hf_hook" not in vars(layer)
    if patched or type(layer).__call__ is not nn.Module.__call__:
        return None
    for owner, name, make, is_kept in _KNOWN:
        kind = _class(layer, owner, name)
        if kind is not None:
            return make() if type(layer).forward is kind.forward and is_kept(layer) else None
    plain = type(layer).forward is nn.Linear.forward
    return TorchAO() if plain and type(weight).__module__.startswith("torchao.") else None


def is_packed_bitnet(layer: nn.Module) -> bool:
    """Is it transformers' BitLinear, a linear layer that is no nn.Linear?"""
    return _class(layer, "transformers", "BitLinear") is not None


def unready(layer: nn.Module) -> str | None:
    """Why a quantised layer cannot be adapted as it is, in one sentence that says what to do; None where it can."""
    name, weight = type(layer).__name__, getattr(layer, "weight", None)
    if is_packed_bitnet(layer):
        return (
            f"{name} rounds its input without a gradient for it, so that nothing below it would train; load the model with "
            'linear_class="autobitlinear"'
        )
    four, eight = _class(layer, "bitsandbytes", "Linear4bit"), _class(layer, "bitsandbytes", "Linear8bitLt")
    torchao = type(weight).__module__.startswith("torchao.")
    if (four or eight or torchao) and weight is not None and weight.is_meta and "_hf_hook" not in vars(layer):
        return f"{name} is quantised and on meta; load its weights before adapting it"
    if four and getattr(weight, "quant_state", None) is None and getattr(layer, "quant_state", None) is None:
        return f"{name} is not quantised yet; move it to its device (layer.to(device)) before adapting it"
    if eight and not layer.state.has_fp16_weights and weight.dtype != torch.int8:  # type: ignore[union-attr]
        return f"{name} is not quantised yet; move it to its device (layer.to(device)) before adapting it"
    return None


def keep_differentiable(layer: nn.Module) -> None:
    """Keeps bitsandbytes from repacking the codes of a Linear4bit on a CPU, and takes a repacking back.

    In evaluation it repacks for a kernel that has no gradient, which training then meets, rounds the scales to bfloat16,
    and fails where N is no multiple of 32.
    """
    if _class(layer, "bitsandbytes", "Linear4bit") is None:
        return
    if hasattr(layer, "support_avx512bf16_for_cpu"):
        layer.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
    weight: Any = layer.weight
    if _is_packed(weight):
        weight.data, weight.quant_state = _unpacked(weight)
        layer.quant_state = weight.quant_state


def keeping_codes(fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """`module.to`'s conversion of a tensor, but for bitsandbytes' codes of four bits that are stored in a floating dtype:
    as numbers of another one they would be other codes."""

    def convert(tensor: Tensor) -> Tensor:
        converted = fn(tensor)
        has_codes = getattr(tensor, "quant_state", None) is not None
        return tensor.to(converted.device) if has_codes and converted.dtype != tensor.dtype else converted

    return convert


def moved(parts: dict[str, Any], fn: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    """Attributes of a layer, which it does not hold now, as `module.to` would leave them; `fn` is its conversion of a tensor."""
    return {name: _moved(value, fn) for name, value in parts.items()}


def _moved(value: Any, fn: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        applied = fn(value)
        # As torch does it, so that what hangs on a parameter stays there.
        if torch._has_compatible_shallow_copy_type(value, applied) and not is_traceable_wrapper_subclass(applied):
            value.data = applied.data
        else:
            value = applied if isinstance(applied, nn.Parameter) else nn.Parameter(applied, requires_grad=False)
    # Codes and scales of eight bits hang on the weight or on the layer's state; those of four bits move with the weight.
    for name in ("CB", "SCB"):
        tensor = getattr(value, name, None)
        if tensor is not None:
            setattr(value, name, tensor.to(fn(tensor).device))
    return value


def _class(layer: nn.Module, owner: str, name: str) -> Any:
    """The class of that name, from that package, which a layer is an instance of; None where it is of none."""
    kinds = type(layer).__mro__
    return next((c for c in kinds if c.__name__ == name and c.__module__.split(".")[0] == owner), None)


def _has_codes(layer: Any) -> bool:
    return getattr(layer.weight, "quant_state", None) is not None


def _has_int8_codes(layer: Any) -> bool:
    return not layer.state.has_fp16_weights and layer.weight.dtype == torch.int8


def _is_one_byte(layer: Any) -> bool:
    return layer.weight.element_size() == 1


def _is_ternary(layer: Any) -> bool:
    return not layer.online_quant and layer.rms_norm is None


# Package and class, how its weight is read, and whether it is there to be read.
_KNOWN: tuple[tuple[str, str, type, Callable[[Any], bool]], ...] = (
    ("bitsandbytes", "Linear4bit", FourBit, _has_codes),
    ("bitsandbytes", "Linear8bitLt", EightBit, _has_int8_codes),
    ("transformers", "FP8Linear", FineGrainedFP8, _is_one_byte),
    ("transformers", "AutoBitLinear", BitNet, _is_ternary),
)


def _bitsandbytes() -> Any:
    import bitsandbytes

    return bitsandbytes


def _is_packed(weight: Any) -> bool:
    return bool(getattr(getattr(weight, "quant_state", None), "packing_format_for_cpu", False))


def _unpacked(weight: Any) -> tuple[Tensor, Any]:
    """The codes and their state as they are stored; those that a CPU's kernel had repacked are taken back, in a copy."""
    codes, state = weight.data, weight.quant_state
    if not _is_packed(weight):
        return codes, state
    return _bitsandbytes().functional._convert_weight_packed_for_cpu_inverse(codes, copy.copy(state))


def _codes(layer: Any) -> tuple[Tensor, Tensor]:
    """int8 codes (N, K) and the scale of each row, which the first call of the layer moves from the weight to its state."""
    weight, state = layer.weight, layer.state
    # In this order, since another thread may call the layer meanwhile.
    scale = weight.SCB
    return weight.data, state.SCB if scale is None else scale


def _granularity(old: Any) -> Any:
    from torchao.quantization import PerGroup, PerRow, PerTensor

    (n, k), (rows, columns) = old.shape, old.block_size
    if (rows, columns) == (n, k):
        return PerTensor()
    return PerRow() if columns == k else PerGroup(columns)


def _mapping(old: Any) -> Any:
    from torchao.quantization.quant_primitives import MappingType

    zero = getattr(old, "zero_point", None)
    symmetric = zero is None or not bool(zero.any())
    return MappingType.SYMMETRIC if symmetric else MappingType.ASYMMETRIC


def _int8(old: Any, weight: Tensor) -> Tensor:
    # Releases before 0.18 know fewer of these.
    names = ("act_quant_kwargs", "act_quant_scale", "act_quant_zero_point", "reduce_range")
    known = {name: getattr(old, name) for name in names if hasattr(old, name)}
    return type(old).from_hp(weight, _granularity(old), mapping_type=_mapping(old), **known)


def _float8(old: Any, weight: Tensor) -> Tensor:
    return type(old).from_hp(
        weight,
        float8_dtype=old.qdata.dtype,
        granularity=_granularity(old),
        mm_config=old.mm_config,
        kernel_preference=old.kernel_preference,
        act_quant_kwargs=old.act_quant_kwargs,
    )


def _intx(old: Any, weight: Tensor) -> Tensor:
    return type(old).from_hp(
        weight,
        old.block_size,
        old.target_dtype,
        mapping_type=_mapping(old),
        activation_quantization=old.activation_quantization,
    )


_MAKERS = {"Int8Tensor": _int8, "Float8Tensor": _float8, "IntxUnpackedToInt8Tensor": _intx}
"""How a new tensor of one of torchao's classes is made after the pattern of an old one."""
