"""What a step has to send by its scheme's own rules: bytes of the whole tensors of its collectives, for one process.

W are the bytes of all parameters of the blocks, H those of the head, T those that train, M the tokens of a process's batch.

| scheme | collectives |
| --- | --- |
| DDP | all-reduce T |
| FSDP2 | all-gather 2 W + H (the root keeps the head from its forward pass on), reduce-scatter T |
| FSDP1 | the same gathers, but a block's flat gradient is reduced whole where anything in it trains: W + H in place of T |
| TP 2 | all-reduce of the activations, M x WIDTH twice a block (y of `down`, dx of `up`); with adapters those of the gradients that every process has a part of: dA and dΔσ of `up`, dB and dΔσ of `down` |
| TP x FSDP 2x2 | both, of half the tokens and of half the divided parameters |
| ZeRO-2 | all-reduce T, all-gather T |
| ZeRO-3 | all-gather W + H (DeepSpeed keeps so few parameters from the forward pass to the backward), reduce-scatter T |
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from support.schemes import CLASSES

from .network import BLOCKS, HIDDEN, RANK, ROWS, TOKENS, WIDTH

FLOAT = 4


class Sizes(NamedTuple):
    """Elements of a block: its base layers and adapters, those that tensor parallelism divides and those it does not; of the
    head; and which train."""

    base_divided: int
    base_whole: int
    adapters_divided: int
    adapters_whole: int
    head: int
    base_trains: bool

    @property
    def block(self) -> int:
        return self.base_divided + self.base_whole + self.adapters_divided + self.adapters_whole

    @property
    def block_trained(self) -> int:
        return self.adapters_divided + self.adapters_whole + self.base_trains * (self.base_divided + self.base_whole)

    @property
    def trained(self) -> int:
        return BLOCKS * self.block_trained + self.head

    def divided(self, by: int) -> Sizes:
        return self._replace(base_divided=self.base_divided // by, adapters_divided=self.adapters_divided // by)


def sizes(adapted: bool, base_trains: bool) -> Sizes:
    # Divided are W and bias of `up`, W of `down`; B of `up`, A of `down`. Whole: `down`'s bias; A of `up`, B of `down`, Δσ.
    return Sizes(
        2 * WIDTH * HIDDEN + HIDDEN,
        WIDTH,
        adapted * 2 * HIDDEN * RANK,
        adapted * (2 * WIDTH * RANK + 2 * RANK),
        CLASSES * (WIDTH + 1),
        base_trains,
    )


def ddp(n: Sizes) -> int:
    return FLOAT * n.trained


def fsdp2(n: Sizes) -> int:
    return FLOAT * (2 * BLOCKS * n.block + n.head + n.trained)


def fsdp1(n: Sizes) -> int:
    reduced = BLOCKS * (n.block if n.block_trained else 0) + n.head
    return FLOAT * (2 * BLOCKS * n.block + n.head + reduced)


def tensor_parallel(n: Sizes, tokens: int = ROWS * TOKENS) -> int:
    return FLOAT * BLOCKS * (2 * tokens * WIDTH + n.adapters_whole)


def both(n: Sizes) -> int:
    return tensor_parallel(n, ROWS * TOKENS // 2) + fsdp2(n.divided(2))


def zero2(n: Sizes) -> int:
    return FLOAT * 2 * n.trained


def zero3(n: Sizes) -> int:
    return FLOAT * (BLOCKS * n.block + n.head + n.trained)


MODELS: dict[str, Callable[[Sizes], int]] = {
    "ddp": ddp,
    "fsdp1": fsdp1,
    "fsdp2": fsdp2,
    "tp2": tensor_parallel,
    "tp2_fsdp2": both,
    "zero2": zero2,
    "zero3": zero3,
}
