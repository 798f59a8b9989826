"""PyTorch's jiterator without a GPU: the same code string, compiled by g++ and run element by element on the CPU."""

from __future__ import annotations

import ctypes
import shutil
import subprocess

import torch

from loradash_kernels.backends import fused_dropout

_LOOP = """
extern "C" void run(long count, const int* bits, const int* rows, const int* columns, const int* words, int threshold,
                    int elements, int* out) {
  for (long i = 0; i < count; ++i)
    out[i] = kept_bits<int>(bits[i], rows[i], columns[i], words[0], words[1], words[2], words[3], threshold, elements);
}
"""


def missing() -> str | None:
    return None if shutil.which("g++") else "the formula is compiled with g++, which is not there"


def compiled(folder):
    """A function that is called as the one that jiterator makes of `fused_dropout.CODE`."""
    source, library = folder / "kept_bits.cpp", folder / "kept_bits.so"
    source.write_text(fused_dropout.CODE + _LOOP)
    command = ["g++", "-std=c++17", "-O1", "-Wall", "-Werror", "-shared", "-fPIC", str(source), "-o", str(library)]
    subprocess.run(command, check=True)
    run = ctypes.CDLL(str(library)).run

    def draw(bits, rows, columns, *words, threshold, elements):
        assert all(t.dtype == torch.int32 for t in (bits, rows, columns, *words)), "one dtype: nothing is promoted"
        bits, rows, columns = (t.contiguous() for t in torch.broadcast_tensors(bits, rows, columns))
        words, out = torch.stack(words), torch.empty_like(bits)
        pointers = [ctypes.c_void_p(t.data_ptr()) for t in (bits, rows, columns, words, out)]
        run(ctypes.c_long(out.numel()), *pointers[:4], threshold, elements, pointers[4])
        return out

    return draw
