"""Best-fit decreasing bin packing of documents into rows.

Rows are bins of a fixed number of tokens. Documents go in from the longest to the shortest, each
into the fullest bin that still has space for it. The result is at most 11/9 of the best possible
plus one bin (Johnson, 1973), and in practice wastes a percent or two. No document is split or cut.
"""

from bisect import bisect_left, insort
from collections import defaultdict
from collections.abc import Sequence

import numpy as np


def best_fit(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Pack items into bins.

    Args:
        lengths: size of each item, 1 to `budget`.
        budget: size of a bin.

    Returns:
        bins of item indices, each bin's lengths adding up to at most `budget`; every index occurs
        once. Equal lengths go in by their index, so that the number and the fill of the bins
        depends only on the lengths.

    Raises:
        ValueError: an item is empty or larger than a bin.
    """
    sizes = np.asarray(lengths, dtype=np.int64)
    if sizes.size and (int(sizes.min()) < 1 or int(sizes.max()) > budget):
        raise ValueError(
            f"lengths from {int(sizes.min())} to {int(sizes.max())} do not fit bins of {budget}"
        )
    bins: list[list[int]] = []
    bins_with_space: defaultdict[int, list[int]] = defaultdict(list)
    spaces: list[int] = []
    for index in np.argsort(-sizes, kind="stable").tolist():
        size = int(sizes[index])
        fit = bisect_left(spaces, size)
        if fit == len(spaces):
            number, space = len(bins), budget
            bins.append([])
        else:
            space = spaces[fit]
            number = bins_with_space[space].pop()
            if not bins_with_space[space]:
                spaces.pop(fit)
        bins[number].append(index)
        left = space - size
        if left > 0:
            if not bins_with_space[left]:
                insort(spaces, left)
            bins_with_space[left].append(number)
    return bins
