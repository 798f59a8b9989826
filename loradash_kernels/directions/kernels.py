"""The door to the kernels of the pre-launch phase: the only file of this room that knows a backend."""

from __future__ import annotations

import contextlib
from typing import Protocol

import torch
from torch import Tensor

from ..backends.triton import backend as triton_backend

# Where the kernels serve. Tests add the CPU, under Triton's interpreter.
KERNEL_DEVICES = {"cuda"}


class PrelaunchKernels(Protocol):
    """What a backend offers to the pre-launch phase; `backends/triton/prelaunch.py` says how each is computed."""

    def sketch(
        self,
        w: Tensor,  # (L, N, K)
        seed: Tensor,  # (2,) int64
        width: int,
    ) -> Tensor:
        """(L, N, width): W times a Gaussian matrix."""

    def jacobi(
        self,
        x: Tensor,  # (L, n, K), n <= K
    ) -> tuple[Tensor, Tensor, Tensor]:
        """σ (L, n) descending, Vᵀ (L, n, K), and whether the rotations converged (L,) bool."""

    def takes(self, n: int, rank: int) -> bool:
        """Does `rates` take so many triplets at this LoRA rank?"""

    def rates(
        self,
        u: Tensor,  # (L, N, n)
        v: Tensor,  # (L, K, n)
        sigma: Tensor,  # (L, n)
        b: Tensor,  # (L, N, r)
        at: Tensor,  # (L, K, r)
        s: int,
        scaling: float,
        eps: float,
        one_sided: bool,
    ) -> tuple[Tensor, Tensor]:
        """The s highest change rates (L, s) and their indices (L, s)."""


def kernels_for(t: Tensor) -> PrelaunchKernels | None:
    """The kernels where they can serve: float32, on a GPU, with Triton; None elsewhere."""
    if t.device.type not in KERNEL_DEVICES or t.dtype != torch.float32 or triton_backend.missing() is not None:
        return None
    # Imported here, because it needs Triton, which may not be installed.
    from ..backends.triton import prelaunch

    return prelaunch


def on_device(t: Tensor) -> contextlib.AbstractContextManager:
    """The context in which these kernels are launched: Triton takes the current GPU for that of its arguments."""
    return torch.cuda.device(t.device) if t.is_cuda else contextlib.nullcontext()


def factors_in_batches(device: torch.device) -> bool:
    """Does this device factor a batch fastest by batched products? A GPU's library takes its matrices one by one."""
    return device.type in KERNEL_DEVICES
