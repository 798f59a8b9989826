"""MODELLED, not measured: what a step of every arm must do, over what the frozen model must.

FLOPs: with M rows, an adapted layer of K in- and N out-features takes

    frozen     4 M K N                          y = x W^T and dx = dy W
    LoRA       + 6 M r (K + N)                  D x, Q, and in backward dy Q, D, dA, dB
    LoRA-Dash  + 2 M (2 (r + s) + r) (K + N)    the same products, s wider; U and V have no gradients
    authors'   + 6 M r (K + N) + 6 M K N + 4 N K s    U diag(dsigma) V^T is a dense matrix, formed, multiplied by x and by dy, and has
                                                a dense gradient dy^T x

and the rest is common: the head (4 M hidden vocabulary) and attention (12 M T hidden, half of it masked).

Bytes: large operands that the passes of an adapted layer read and write, one after the other, nothing reused between them; with
dropout, each of X = M K, Y = M N, W = N K elements:

    frozen     forward X + Y + W      backward X + Y + W
    ours       2 X + Y + W            2 X + 2 Y + W
    PEFT LoRA  4 X + 7 Y + W          8 X + 5 Y + W         dropout, A, B, times scaling, plus y; and back
    authors'   7 X + 11 Y + 3 W       15 X + 7 Y + 4 W      and the dash term, with its dense matrix, in the same way
"""

from __future__ import annotations

from benchmarks.layers.variants import DIRECTIONS, RANK

from .models import VOCABULARY, Sizes

FROZEN, BY_OPERATORS, OURS, AUTHORS = "frozen", "LoRA by operators", "ours", "authors'"
# Passes over X, Y and W of an adapted layer, forward and backward together.
PASSES = {FROZEN: (2, 2, 2), BY_OPERATORS: (12, 12, 2), OURS: (4, 3, 2), AUTHORS: (22, 18, 7)}


def layer_flops(kind: str, m: int, k: int, n: int, directions: int) -> int:
    """Forward and backward of an adapted layer; directions: 0 before launch and for plain LoRA."""
    frozen, lora = 4 * m * k * n, 6 * m * RANK * (k + n)
    if kind == FROZEN:
        return frozen
    if kind == AUTHORS and directions:
        return frozen + lora + 6 * m * k * n + 4 * n * k * directions
    return frozen + lora + 4 * m * directions * (k + n)


def common_flops(sizes: Sizes) -> int:
    """The head and the attention."""
    head = 4 * sizes.rows * sizes.hidden * VOCABULARY
    return head + 6 * sizes.layers * sizes.rows * sizes.tokens * sizes.hidden


def flops(kind: str, sizes: Sizes, directions: int = DIRECTIONS) -> int:
    """FLOPs of a step, without the elementwise ones."""
    return common_flops(sizes) + sum(layer_flops(kind, sizes.rows, k, n, directions) for k, n in sizes.linears)


def elements(kind: str, sizes: Sizes, directions: int = DIRECTIONS) -> int:
    """Elements that the adapted layers' passes read and write in a step."""
    x, y, w = PASSES[kind if kind != AUTHORS or directions else BY_OPERATORS]
    m = sizes.rows
    return sum(x * m * k + y * m * n + w * n * k for k, n in sizes.linears)
