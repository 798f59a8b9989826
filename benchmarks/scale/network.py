"""The network whose traffic is counted: that of tests/support/schemes, wider."""

from __future__ import annotations

import torch
from support.schemes import CLASSES, Block, Network
from torch import Tensor, nn

BLOCKS, WIDTH, HIDDEN = 2, 256, 1024
ROWS, TOKENS = 8, 16
RANK = 8


class WideBlock(Block):
    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.up = nn.Linear(WIDTH, HIDDEN)
        self.down = nn.Linear(HIDDEN, WIDTH)


class WideNetwork(Network):
    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.blocks = nn.ModuleList([WideBlock() for _ in range(BLOCKS)])
        self.head = nn.Linear(WIDTH, CLASSES)


def network() -> WideNetwork:
    """A new one, the same in every process."""
    torch.manual_seed(0)
    return WideNetwork()


def batch() -> tuple[Tensor, Tensor]:
    """x (ROWS, TOKENS, WIDTH) and the target (ROWS, TOKENS, CLASSES)."""
    draw = torch.Generator().manual_seed(1)
    return torch.randn(ROWS, TOKENS, WIDTH, generator=draw), torch.randn(ROWS, TOKENS, CLASSES, generator=draw)
