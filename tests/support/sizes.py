"""How large the problems of tests/gpu are: on a card, and in the rehearsal on the CPU."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Sizes:
    """Shapes are (M, K, N)."""

    # Products for every tile and strategy: K and N that every tile takes, and ragged ones; always a ragged M.
    tiles: tuple[tuple[int, int, int], ...]
    # As a model has them.
    large: tuple[tuple[int, int, int], ...]
    # Few rows, and rows beside the sides of tiles.
    ragged: tuple[tuple[int, int, int], ...]
    # (M, K) of a mask that is read bit by bit, and of one whose statistics are taken.
    mask: tuple[int, int]
    statistics: tuple[int, int]
    # How often a call is repeated where its bits must be the same.
    repeats: int
    # The elements from which on an index no longer fits 32 bits.
    many: int
    # The long side of a tensor of as many.
    wide: int
    # A row stride with which some hundred rows span as many.
    far: int


CARD = Sizes(
    tiles=((777, 1152, 1280), (517, 1090, 1282)),
    large=((8192, 4096, 4096), (4096, 11008, 4096), (2048, 4096, 14336), (512, 4096, 128256)),
    ragged=(
        *((m, 4096, 4096) for m in (1, 3, 17, 127, 129)),
        (129, 4095, 4096),
        (129, 4096, 4097),
        (333, 1001, 777),
        (4097, 64, 8),
    ),
    mask=(150, 192),
    statistics=(4096, 4096),
    repeats=50,
    many=2**31,
    wide=4104,
    far=2**24,
)
REHEARSAL = Sizes(
    tiles=((37, 64, 128), (37, 50, 70)),
    large=((64, 64, 64), (40, 96, 48), (24, 48, 96), (8, 40, 200)),
    ragged=((1, 40, 48), (17, 40, 48), (33, 63, 48), (33, 40, 65)),
    mask=(20, 64),
    statistics=(512, 512),
    repeats=3,
    many=2**12,
    wide=72,
    far=2**8,
)
