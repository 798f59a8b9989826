"""How large the problems of tests/gpu are: on a card, and in the rehearsal on the CPU."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Sizes:
    """Shapes are (M, K, N)."""

    # A product for every tile and strategy: each has a tile in the middle and ragged edges.
    tiles: tuple[int, int, int]
    # As a model has them.
    large: tuple[tuple[int, int, int], ...]
    # Few rows, and rows beside the sides of tiles.
    ragged: tuple[tuple[int, int, int], ...]
    # How often a call is repeated where its bits must be the same.
    repeats: int
    # The elements from which on an index no longer fits 32 bits.
    many: int
    # A row stride with which a tile of 256 rows spans as many.
    far: int


CARD = Sizes(
    tiles=(777, 1096, 1288),
    large=((8192, 4096, 4096), (4096, 11008, 4096), (2048, 4096, 14336), (512, 4096, 128256)),
    ragged=(
        *((m, 4096, 4096) for m in (1, 3, 17, 127, 129)),
        (129, 4095, 4096),
        (129, 4096, 4097),
        (333, 1001, 777),
        (4097, 64, 8),
    ),
    repeats=50,
    many=2**31,
    far=2**24,
)
REHEARSAL = Sizes(
    tiles=(37, 72, 88),
    large=((64, 64, 64),),
    ragged=((1, 40, 48), (17, 40, 48), (33, 63, 48), (33, 40, 65)),
    repeats=3,
    many=2**11,
    far=2**8,
)
