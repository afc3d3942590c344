"""The largest pass that one of several ranks can have.

A step's rows are dealt to ranks (`engine.distributed.deal`), so a pass of a rank may be smaller
than a micro-batch. Where all rows are as long, dealing them says how much smaller. Where they
differ, what follows from the rules of dealing bounds every step that the rows can make.

By cost, a rank that gets k of n rows got the last of them when every other rank had as much
already. Before it, it had at most Y = S(n - k) / (N - 1), S(i) being the cost of the i dearest rows
and N the ranks; the last row is its cheapest, so it ends with at most Y k / (k - 1). In order, a
rank ends at the rows' boundaries that are nearest to its N-th of the cost, so it has at most that
and one row.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from engine.config.train_config import TrainConfig
from engine.distributed.deal import PassLimits, RowCost, deal_by_cost, deal_in_order
from engine.distributed.dealing import cost_of, dealt_in_order
from engine.distributed.group import processes_of
from models.config.model_config import ModelConfig


@dataclass(frozen=True)
class LargestPass:
    """The rows of a rank's largest pass by their lengths, and of how many such its step is."""

    lengths: tuple[int, ...]
    passes: float


def largest_pass(
    config: TrainConfig, lengths: Sequence[int] | None, model: ModelConfig
) -> LargestPass:
    """The largest pass of any rank in a run over rows of these lengths.

    Where `lengths` is None every row is as long as the settings allow. The run has
    `processes_of(config)` ranks, two or more; those that share a batch's tokens have the same rows,
    and may be all of them.
    """
    most, rows = config.max_length * config.sequences_per_example, _rows(config)
    ranks, cost = processes_of(config) // config.context_parallel, cost_of(model)
    cut = [most] * rows if lengths is None else [min(most, length) for length in lengths]
    longest = sorted(cut, reverse=True)[:rows]
    if config.packing:
        return _packed(config, cut, cost, ranks)
    if min(cut) == max(cut):
        return _alike(config, longest, cost, ranks)
    if dealt_in_order(config):
        share = sum(map(cost, longest)) / ranks + cost(longest[0])
        piece = _costing(longest[: config.batch_size], share, cost)
    else:
        piece = _by_cost(longest, config.batch_size, cost, ranks)
    return LargestPass(piece, max(1.0, sum(longest) / ranks / sum(piece)))


def _rows(config: TrainConfig) -> int:
    return config.batch_size * config.accumulate


def _packed(config: TrainConfig, lengths: Sequence[int], cost: RowCost, ranks: int) -> LargestPass:
    """Packed rows, which are cut by tokens: at most all that a micro-batch holds."""
    row = min(config.max_length, sum(lengths))
    whole, longest = row * config.batch_size, max(lengths)
    share = _rows(config) * cost(row) / ranks + cost(longest)
    tokens = min(whole, math.ceil(share / cost.linear))
    full, rest = divmod(tokens, row)
    piece = (row,) * full + ((rest,) if rest else ())
    return LargestPass(piece, max(1.0, _rows(config) * row / ranks / tokens))


def _alike(config: TrainConfig, lengths: Sequence[int], cost: RowCost, ranks: int) -> LargestPass:
    """The largest pass where every row has one length: the rows are dealt."""
    size, count, length = config.batch_size, len(lengths), lengths[0]
    step = [range(first, min(first + size, count)) for first in range(0, count, size)]
    if dealt_in_order(config):
        dealt = deal_in_order(step, lambda _: length, cost, ranks)
    else:
        dealt = deal_by_cost(step, lambda _: length, cost, ranks, PassLimits(size))
    rows = max(len(piece.rows) for pieces in dealt for piece in pieces)
    return LargestPass((length,) * rows, -(-count // ranks) / rows)


def _by_cost(longest: Sequence[int], most: int, cost: RowCost, ranks: int) -> tuple[int, ...]:
    """The most tokens of a pass, over the numbers of rows that a rank may get."""
    if ranks == 1:  # it gets all rows
        count = len(longest)
        return tuple(longest[: math.ceil(count / math.ceil(count / most))])
    sums = list(accumulate(map(cost, longest), initial=0.0))
    best: tuple[int, ...] = (longest[0],)
    for count in range(2, len(longest) + 1):
        others = sums[len(longest) - count]
        if others == 0.0:
            break
        share = others / (ranks - 1) * count / (count - 1)
        rows = math.ceil(count / math.ceil(count / most))
        best = max(best, _costing(longest[:rows], share, cost), key=sum)
    return best


def _costing(lengths: Sequence[int], limit: float, cost: RowCost) -> tuple[int, ...]:
    """The most tokens of as many rows, none longer than the first, that cost at most `limit`.

    A row's cost grows faster than its tokens, so rows of one length have most.
    """
    if sum(map(cost, lengths)) <= limit:
        return tuple(lengths)
    each = limit / len(lengths)
    root = math.sqrt(cost.linear**2 + 4 * cost.square * each)
    length = math.ceil(2 * each / (cost.linear + root))
    return (min(length, lengths[0]),) * len(lengths)
