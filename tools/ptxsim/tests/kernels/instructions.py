"""PTX that runs one instruction, operands for it, and numpy references of what it computes."""

import math

import numpy as np

N = 256
REG = {
    "u8": "b16",
    "s8": "b16",
    "u16": "b16",
    "s16": "b16",
    "f16": "b16",
    "bf16": "b16",
    "b16": "b16",
    "u32": "b32",
    "s32": "b32",
    "b32": "b32",
    "f32": "f32",
    "f16x2": "b32",
    "bf16x2": "b32",
    "u64": "b64",
    "s64": "b64",
    "b64": "b64",
    "f64": "f64",
    "pred": "pred",
}
NP = {
    "u8": np.uint8,
    "s8": np.int8,
    "u16": np.uint16,
    "s16": np.int16,
    "f16": np.float16,
    "b16": np.uint16,
    "bf16": np.uint16,
    "u32": np.uint32,
    "s32": np.int32,
    "b32": np.uint32,
    "f32": np.float32,
    "f16x2": np.uint32,
    "bf16x2": np.uint32,
    "u64": np.uint64,
    "s64": np.int64,
    "b64": np.uint64,
    "f64": np.float64,
}
MEM = {"pred": "u32", "f16": "b16", "bf16": "b16", "f16x2": "b32", "bf16x2": "b32"}


def kernel_text(name, body, ins, outs, setup=""):
    lines = [
        f".visible .entry {name}(" + ", ".join(f".param .u64 p{i}" for i in range(len(ins) + len(outs))) + ")",
        "{",
        ".reg .b32 %t, %z; .reg .b64 %a, %i; .reg .pred %q;",
        ".reg .b32 %x<9>; .reg .b64 %y<9>; .reg .b16 %h<9>; .reg .f32 %f<9>;",
        setup,
    ]
    for k, t in enumerate(ins):
        lines.append(f".reg .{REG[t]} %s{k};" + (f".reg .u32 %s{k}w;" if t == "pred" else ""))
    for k, t in enumerate(outs):
        lines.append(f".reg .{REG[t]} %d{k};" + (f".reg .u32 %d{k}w;" if t == "pred" else ""))
    lines.append("mov.u32 %t, %tid.x; cvt.u64.u32 %i, %t;")
    for k, t in enumerate(ins):
        size = np.dtype(NP.get(MEM.get(t, t), np.uint32)).itemsize
        lines.append(f"ld.param.u64 %a, [p{k}]; mad.lo.u64 %a, %i, {size}, %a;")
        lines.append(
            f"ld.global.u32 %s{k}w, [%a]; setp.ne.u32 %s{k}, %s{k}w, 0;"
            if t == "pred"
            else f"ld.global.{MEM.get(t, t)} %s{k}, [%a];"
        )
    lines.append(body.format(*[f"%d{k}" for k in range(len(outs))], *[f"%s{k}" for k in range(len(ins))]))
    for k, t in enumerate(outs):
        size = np.dtype(NP.get(MEM.get(t, t), np.uint32)).itemsize
        lines.append(f"ld.param.u64 %a, [p{len(ins) + k}]; mad.lo.u64 %a, %i, {size}, %a;")
        lines.append(
            f"selp.u32 %d{k}w, 1, 0, %d{k}; st.global.u32 [%a], %d{k}w;"
            if t == "pred"
            else f"st.global.{MEM.get(t, t)} [%a], %d{k};"
        )
    return "\n".join([*lines, "ret;", "}"]) + "\n"


def header(arch="sm_80"):
    return f".version 8.8\n.target {arch}\n.address_size 64\n"


def inputs(t, rng, kind):
    if t == "pred":
        return rng.integers(0, 2, N).astype(np.uint32)
    d = np.dtype(NP[t])
    if t == "f16":
        v = rng.standard_normal(N).astype(np.float16) * np.float16(4)
        v[:4] = [0, -0.0, np.inf, 6e-8]
        return v
    if d.kind == "f":
        v = (rng.standard_normal(N) * 8).astype(d)
        if kind == "pos":
            return np.abs(v) + d.type(0.01)
        v[:4] = [0, -0.0, 1e-30, 3e8]
        return v
    info = np.iinfo(d)
    v = rng.integers(info.min, info.max, N, dtype=d, endpoint=True)
    v[:6] = np.array([0, 1, info.max, info.min, info.max - 1, 5], dtype=d)
    if kind == "small":
        v = (v & d.type(0x7F)).astype(d)
    if kind == "nz":
        v[v == 0] = 3
    return v


def f16x2(op):
    def f(*a):
        parts = [np.ascontiguousarray(x).view(np.float16).astype(np.float64) for x in a]
        with np.errstate(all="ignore"):
            return op(*parts).astype(np.float16).view(np.uint32)

    return f


def bf16_round(x):
    b = np.asarray(x, np.float32).view(np.uint32).astype(np.uint64)
    return ((b + 0x7FFF + ((b >> 16) & 1)) >> 16).astype(np.uint16)


def prmt(a, b, c):
    v = a.astype(np.uint64) | b.astype(np.uint64) << np.uint64(32)
    r = np.zeros(N, np.uint32)
    for i in range(4):
        s = c >> np.uint32(4 * i) & np.uint32(15)
        byte = (v >> (np.uint64(8) * (s & np.uint32(7)).astype(np.uint64))).astype(np.uint32) & np.uint32(0xFF)
        byte = np.where(s & 8, np.where(byte & 0x80, 0xFF, 0), byte).astype(np.uint32)
        r |= byte << np.uint32(8 * i)
    return r


def each(f):
    return lambda *a: np.array([f(*(int(x) for x in row)) for row in zip(*a, strict=True)], dtype=object)


def sx(v, bits):
    v &= (1 << bits) - 1
    return v - (1 << bits) if v >> (bits - 1) else v


def bfe(a, p, n, bits, signed):
    p, n = p & 255, n & 255
    u = a & ((1 << bits) - 1)
    if n == 0:
        return 0
    sign = (u >> min(p + n - 1, bits - 1)) & 1 if signed else 0
    r = (u >> p) & ((1 << n) - 1) if p < bits else 0
    have = max(0, min(n, bits - p))
    if sign:
        r |= ((1 << bits) - 1) & ~((1 << have) - 1)
    return sx(r, bits) if signed else r


def trunc_div(a, b):
    return int(math.copysign(1, a) * math.copysign(1, b)) * (abs(a) // abs(b)) if a else 0
