"""Which tokens a data set teaches as the end of an answer."""

from __future__ import annotations

from collections.abc import Collection, Iterable

import numpy as np

from engine.data.examples import Example


def taught_stops(
    examples: Iterable[Example], special_ids: Collection[int], max_length: int
) -> tuple[int, ...]:
    """Ids of the special tokens that end a stretch of trained tokens, the commonest first.

    A stretch that the length limit cut off ends anywhere, and does not count.
    """
    counts: dict[int, int] = {}
    for example in examples:
        last = example.mask.copy()
        last[:-1] &= ~example.mask[1:]
        if len(example) >= max_length:
            last[-1:] = False
        for index in example.ids[np.flatnonzero(last)].tolist():
            if index in special_ids:
                counts[index] = counts.get(index, 0) + 1
    return tuple(sorted(counts, key=lambda index: (-counts[index], index)))
