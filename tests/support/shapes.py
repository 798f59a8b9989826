"""Shapes (M, K, N, r, s) and dtypes that every backend is tested with."""

from __future__ import annotations

import torch

SHAPES = [
    (1, 1, 1, 1, 1),
    (1, 64, 64, 8, 8),
    (5, 7, 3, 2, 2),
    (31, 33, 65, 5, 3),
    (64, 128, 96, 16, 8),
    (127, 131, 61, 7, 1),
    (200, 96, 320, 40, 8),  # R over one panel
    (300, 513, 257, 16, 8),
    (513, 288, 64, 3, 5),
    (700, 64, 32, 4, 4),
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
