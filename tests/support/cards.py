"""Cards that are not there: as much of a tensor on one as a choice of backend looks at, and calls of such tensors."""

from __future__ import annotations

import torch

from loradash_kernels.calls import BackwardCall, ForwardCall


class OnCard:
    """x (M, K) on a card."""

    device = torch.device("cuda", 0)
    is_cuda, is_cpu = True, False

    def __init__(self, dtype=torch.bfloat16, shape=(8, 16)):
        self.dtype, self.shape = dtype, torch.Size(shape)

    def stride(self):
        return self.shape[1], 1

    def element_size(self):
        return self.dtype.itemsize

    def data_ptr(self):
        return 0

    def get_device(self):
        return self.device.index


def forward_call(x, width=24):
    """A forward call with this x, on whatever device, and R = `width`."""
    (m, k), n = x.shape, 32
    weight, a, b = torch.empty(n, k, dtype=x.dtype), torch.empty(width, k), torch.empty(n, width)
    return ForwardCall(x, weight, None, a, b, *[None] * 4, 1.0, 0, None, torch.empty(m, n), torch.empty(m, width))


def backward_call(x, width=24):
    given = forward_call(x, width)
    dy, p = given.y, given.p
    return BackwardCall(dy, x, *given[1:2], *given[3:8], p, None, 1.0, 0, None, given.lora_a, *[None] * 3)
