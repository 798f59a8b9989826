"""Dropout in one kernel on a GPU that has no kernels of ours: PyTorch compiles the formula at run time, with NVRTC, which
comes with it. The mask is that of `random.dropout_mask`, bit for bit.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from ..notices import warn_once
from ..random import dropout_mask

# Philox4x32-10 with the counter (k / 8, m, offset): each of its four words serves two neighbours in k. `bits` are those of
# one element of 32 bits, or of two of 16, the first below the second; `elements` says which, and `column` counts such words.
CODE = """
template <typename T>
T kept_bits(T bits, T row, T column, T key_low, T key_high, T offset_low, T offset_high, T threshold, T elements) {
  const unsigned int k = static_cast<unsigned int>(column) * static_cast<unsigned int>(elements);
  unsigned int c0 = k / 8u, c1 = static_cast<unsigned int>(row);
  unsigned int c2 = static_cast<unsigned int>(offset_low), c3 = static_cast<unsigned int>(offset_high);
  unsigned int key0 = static_cast<unsigned int>(key_low), key1 = static_cast<unsigned int>(key_high);
  for (int round = 0; round < 10; ++round) {
    const unsigned long long first = 0xD2511F53ULL * c0, second = 0xCD9E8D57ULL * c2;
    c0 = static_cast<unsigned int>(second / 4294967296ULL) ^ c1 ^ key0;
    c2 = static_cast<unsigned int>(first / 4294967296ULL) ^ c3 ^ key1;
    c1 = static_cast<unsigned int>(second);
    c3 = static_cast<unsigned int>(first);
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  const unsigned int which = k % 8u / 2u;
  const unsigned int word = which == 0u ? c0 : which == 1u ? c1 : which == 2u ? c2 : c3;
  const unsigned int least = static_cast<unsigned int>(threshold);
  const bool low = word % 65536u >= least, high = word / 65536u >= least;
  unsigned int keep = (low ? 0x0000FFFFu : 0u) | (high ? 0xFFFF0000u : 0u);
  if (elements == 1) keep = (k % 2u ? high : low) ? 0xFFFFFFFFu : 0u;
  return static_cast<T>(static_cast<unsigned int>(bits) & keep);
}
"""


def dropped(x: Tensor, seed: Tensor | None, threshold: int) -> Tensor:
    """x (M, K) with what dropout drops at zero and the rest as it is: the scale 1 / (1 - p) is the caller's.

    x: of 16 or 32 bits an element, any strides. seed and the 16-bit threshold are those of a call.
    """
    # Autograd's tensors of nothing but zeros have no memory to read.
    if seed is None or threshold == 0 or x.numel() == 0 or x._is_zerotensor():
        return x
    (m, k), kernel = x.shape, _kernel(x.device)
    if kernel is None:
        return x * dropout_mask(seed, threshold, m, k)
    words, elements = _words(x), 4 // x.element_size()
    rows, columns = (torch.arange(size, dtype=torch.int32, device=x.device) for size in words.shape)
    # Little-endian halves: the key's, the offset's, then those of the place of a window, which is in the lower ones.
    halves = seed.view(torch.int32).unbind()
    if len(halves) == 8:
        # The code counts words and computes modulo 2^32, as these sums do.
        rows, columns = rows + halves[4], columns + halves[6] // elements
    drawn = kernel(words, rows[:, None], columns, *halves[:4], threshold=threshold, elements=elements)
    return drawn.view(x.dtype)[:, :k]


def _words(x: Tensor) -> Tensor:
    """The elements of x in words of 32 bits: a view where the memory allows it."""
    x = x.resolve_neg()
    if x.element_size() == 4:
        return x.view(torch.int32)
    if x.shape[1] % 2:
        x = torch.nn.functional.pad(x, (0, 1))
    elif x.stride(1) != 1 or x.stride(0) % 2 or x.storage_offset() % 2:
        x = x.clone(memory_format=torch.contiguous_format)
    return x.view(torch.int32)


@functools.cache
def _kernel(device: torch.device) -> Callable[..., Tensor] | None:
    """The compiled formula, or None with a warning where PyTorch cannot compile it here.

    Raises RuntimeError where a CUDA graph is captured that no run of the layer has preceded: the failure is of that moment
    alone and is not remembered.
    """
    try:
        kernel = torch.cuda.jiterator._create_jit_fn(CODE, threshold=0, elements=1)
        # The first call compiles. Two elements beside words of one are read as those of every call are: nothing else is
        # compiled later, be it while a graph is captured.
        words = torch.zeros(2, dtype=torch.int32, device=device)
        kernel(words, *[words[0]] * 6, threshold=1, elements=1)
        return kernel
    except (RuntimeError, AttributeError, AssertionError) as error:
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "loradash: dropout is compiled at its first call, which a captured CUDA graph does not allow: run the layer "
                "once before it is captured"
            ) from error
        warn_once(f"dropout in plain PyTorch takes hundreds of kernels a layer: jiterator cannot be used ({error})")
        return None
