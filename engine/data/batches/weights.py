"""How often the rows of each source are read in an epoch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from engine.data.batches.loader import WEIGHTS, permutation
from engine.data.rows import Row


def weighted_rows(rows: Sequence[Row], seed: int) -> list[Row]:
    """The rows of an epoch: of each source whole passes, and of the rest a choice by the seed.

    A weight of 0.5 is one half of a source's rows, the same in every epoch; 2.5 is each of them
    twice and one half of them once more. Rows keep their order.
    """
    if all(row.origin[1] == 1.0 for row in rows):
        return list(rows)
    members: dict[int, list[int]] = {}
    for index, row in enumerate(rows):
        members.setdefault(row.origin[0], []).append(index)
    result: list[int] = []
    for origin, indices in members.items():
        repeats = times(len(indices), rows[indices[0]].origin[1], seed, origin)
        result += np.repeat(np.array(indices), repeats).tolist()
    return [rows[index] for index in result]


def times(count: int, weight: float, seed: int, origin: int) -> npt.NDArray[np.int64]:
    """How often each of `count` rows of a source is read, (count,) int64; together count x weight.

    At least one row is read.
    """
    total = max(1, round(count * weight))
    whole, rest = divmod(total, count)
    result = np.full(count, whole, dtype=np.int64)
    result[permutation(count, seed, WEIGHTS, origin)[:rest]] += 1
    return result
