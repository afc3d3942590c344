"""A rank's rows of an embedding or of an output head."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from kernels.loss.linear_cross_entropy import Head
from kernels.runtime.ranks import Ranks

BLOCK = 256
"""Elements in whose multiples ranks' rows begin: blocks of 8-bit optimizer states stay whole."""


def rows_per_rank(vocab_size: int, width: int, ranks: int) -> int:
    """Rows (V, H) of each rank; the last ranks may have fewer, or none."""
    step = BLOCK // math.gcd(BLOCK, width)
    return -(-vocab_size // (ranks * step)) * step


def own_rows(vocab_size: int, width: int, ranks: Ranks) -> slice:
    """The rows of this rank."""
    size = rows_per_rank(vocab_size, width, ranks.size)
    first = min(vocab_size, ranks.rank * size)
    return slice(first, min(vocab_size, first + size))


@dataclass(frozen=True, eq=False)
class VocabularyShard:
    """Rows (n, H) of a matrix (V, H), dense or in 8 bits, of which each rank has its own."""

    weight: Head
    vocab_size: int
    ranks: Ranks

    @property
    def per_rank(self) -> int:
        return rows_per_rank(self.vocab_size, int(self.weight.shape[1]), self.ranks.size)

    @property
    def first(self) -> int:
        """The first row of this rank."""
        return min(self.vocab_size, self.ranks.rank * self.per_rank)

    @property
    def trained(self) -> bool:
        return isinstance(self.weight, Tensor) and self.weight.requires_grad
