"""Repairs of Triton's interpreter; GPU code is not concerned.

It keeps bf16 as 16-bit integers: products of them are products of integers, and casts from fp32 truncate. Patched here into
exact upcasts and rounding to nearest even. Up to Triton 3.6 it makes bounds of loops from arrays of one element in a way that
numpy refuses since 2.4.
"""

from __future__ import annotations

import numpy as np


def repair() -> None:
    _repair_bf16()
    _repair_bounds()


def _repair_bounds() -> None:
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patch_lang_tensor(tensor, *scope):
        patch(tensor, *scope)
        tensor.__index__ = lambda self: int(self.handle.data.item())

    interpreter._patch_lang_tensor = patch_lang_tensor


def _repair_bf16() -> None:
    import triton.language as tl
    from triton.runtime import interpreter

    builder = interpreter.InterpreterBuilder
    create_dot, cast = builder.create_dot, builder.cast_impl

    def wide(handle):
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        data = (handle.data.astype(np.uint32) << 16).view(np.float32)
        return interpreter.TensorHandle(data, tl.float32)

    def dot(self, a, b, d, *args):
        return create_dot(self, wide(a), wide(b), d, *args)

    def cast_impl(self, src, dst_type):
        source, target = src.dtype.scalar, dst_type.scalar
        if source == tl.bfloat16:
            return cast(self, wide(src), dst_type) if target != tl.float32 else wide(src)
        if target != tl.bfloat16:
            return cast(self, src, dst_type)
        bits = np.ascontiguousarray(src.data, dtype=np.float32).view(np.uint32)
        rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
        return interpreter.TensorHandle(np.where(np.isnan(src.data), np.uint16(0x7FC0), rounded), tl.bfloat16)

    builder.create_dot, builder.cast_impl = dot, cast_impl
    for name in ("create_fp_ext", "create_fp_trunc", "create_si_to_fp", "create_ui_to_fp", "create_fp_to_si"):
        setattr(builder, name, lambda self, src, dst_type: self.cast_impl(src, dst_type))
