"""The cheapest choice of heads that leaves every layer regular.

A layer is regular where every key/value head that stays is read by the same number of query heads.
It is left with k' key/value heads of s' query heads each; for given k' and s' the cheapest cut
keeps the s' best heads of every group, and the k' groups in which these are worth most. Which cut
each layer takes is decided for all layers at once, by dynamic programming over the number of units
that are pruned: the sum of their scores is the least there is for exactly that number. Where
every head has a key/value head of its own this is the ascending order of the scores.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from engine.pruning.scores import LayerScores


@dataclass(frozen=True)
class Cut:
    """The heads that a layer loses, and the sum of the scores of those that did something."""

    heads: tuple[int, ...] = ()
    lost: float = 0.0


Cuts = dict[int, Cut]
"""Number of units -> the cheapest cut of a layer that loses so many; 0 is always there."""


def regular_cuts(scores: LayerScores, whole: bool, min_heads: int, min_kv_heads: int) -> Cuts:
    """All numbers of heads (of groups, if `whole`) that a layer can lose and stay regular.

    A cut that takes an active head leaves `min_heads` of them, in `min_kv_heads` groups.
    """
    heads = scores.heads
    groups, size = heads.kv_heads, heads.group_size
    cuts: Cuts = {0: Cut()}
    for each in range(size, size - 1 if whole else 0, -1):
        ranked = _ranked(scores, each)
        for groups_left in range(groups, 0, -1):
            stay = {head for group in ranked[:groups_left] for head in group}
            units = groups - groups_left if whole else heads.heads - len(stay)
            pruned = tuple(head for head in range(heads.heads) if head not in stay)
            active = stay & scores.active
            few = len(active) < min_heads or len(heads.groups(active)) < min_kv_heads
            if few and scores.active - stay:
                continue
            cut = Cut(pruned, sum(float(scores.values[h]) for h in pruned if h in scores.active))
            if units not in cuts or cut.lost < cuts[units].lost:
                cuts[units] = cut
    return cuts


def _ranked(scores: LayerScores, each: int) -> list[list[int]]:
    """The best `each` heads of every group, the groups that are worth most first."""

    def rank(head: int) -> tuple[bool, float, int]:
        return head in scores.active, float(scores.values[head]), -head

    def worth(group: list[int]) -> tuple[float, int, int]:
        active = [head for head in group if head in scores.active]
        return sum(float(scores.values[head]) for head in active), len(active), -group[0]

    members = (scores.heads.members(group) for group in range(scores.heads.kv_heads))
    best = [sorted(group, key=rank, reverse=True)[:each] for group in members]
    return sorted(best, key=worth, reverse=True)


def cheapest(cuts: Sequence[Cuts], count: int, quotas: Sequence[int] | None = None) -> list[int]:
    """Units that each layer loses: `count` in all, or the most below it that can be.

    Of all choices it is the one that loses least; with `quotas` the one that strays least from
    them, by the sum of squares, and of those the one that loses least.
    """
    best: dict[int, tuple[int, float]] = {0: (0, 0.0)}
    taken: list[dict[int, int]] = []
    for layer, layer_cuts in enumerate(cuts):
        quota = None if quotas is None else quotas[layer]
        further: dict[int, tuple[int, float]] = {}
        choice: dict[int, int] = {}
        for units, cut in layer_cuts.items():
            astray = 0 if quota is None else (units - quota) ** 2
            for earlier, (before, lost) in best.items():
                total, cost = earlier + units, (before + astray, lost + cut.lost)
                if total <= count and (total not in further or cost < further[total]):
                    further[total], choice[total] = cost, units
        best = further
        taken.append(choice)
    left, chosen = max(best), []
    for choice in reversed(taken):
        chosen.append(choice[left])
        left -= chosen[-1]
    return chosen[::-1]
