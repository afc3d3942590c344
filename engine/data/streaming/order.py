"""A shuffled order of any number of rows that takes no memory.

A Feistel network permutes the numbers below a power of four, and a number that falls outside is
permuted again until it is inside (Black and Rogaway, 2002, "Ciphers with arbitrary finite domains",
the cycle-walking cipher). The order is a pure function of (count, seed, purpose, draw), any part of
it can be had at any time, and rows that lie near each other do not stay together.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

_ROUNDS = 6
_U64 = np.uint64


class ShuffledOrder:
    """A permutation of 0..count-1.

    Args:
        count: how many numbers.
        seed, purpose, draw: which permutation (`engine.data.batches.loader.permutation`).
    """

    def __init__(self, count: int, seed: int, purpose: int, draw: int) -> None:
        self.count = count
        self._half = max(1, (max(count - 1, 1).bit_length() + 1) // 2)
        self._mask = _U64((1 << self._half) - 1)
        key = np.array([seed % 2**64, (purpose << 56) | draw], dtype=np.uint64)
        self._keys = np.random.Philox(key=key).random_raw(_ROUNDS)

    def at(self, positions: npt.ArrayLike) -> npt.NDArray[np.int64]:
        """The numbers at some positions, of the same shape.

        Raises:
            IndexError: a position is not below `count`.
        """
        asked = np.asarray(positions, dtype=np.int64)
        if asked.size and not (int(asked.min()) >= 0 and int(asked.max()) < self.count):
            raise IndexError(f"positions up to {int(asked.max())} of {self.count} rows")
        result = asked.astype(np.uint64).ravel()
        outside = np.arange(result.size)
        while outside.size:
            result[outside] = self._permuted(result[outside])
            outside = outside[result[outside] >= _U64(self.count)]
        return result.astype(np.int64).reshape(asked.shape)

    def _permuted(self, numbers: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
        left, right = numbers >> _U64(self._half), numbers & self._mask
        for key in self._keys:
            left, right = right, left ^ (_mixed(right + key) & self._mask)
        return (left << _U64(self._half)) | right


def _mixed(numbers: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """The finaliser of SplitMix64 (Steele, Lea and Flood, 2014), modulo 2^64."""
    numbers = (numbers ^ (numbers >> _U64(30))) * _U64(0xBF58476D1CE4E5B9)
    numbers = (numbers ^ (numbers >> _U64(27))) * _U64(0x94D049BB133111EB)
    return numbers ^ (numbers >> _U64(31))
