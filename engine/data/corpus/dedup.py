"""Keep one row of those that say the same."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from engine.data.corpus.reading import CorpusRow
from engine.data.corpus.similar import RowSets, join_equal, join_similar, normalised, view


@dataclass(frozen=True)
class Repeat:
    """A row that is left out, for an earlier one that stays."""

    row: int
    original: int
    exact: bool


def repeats_of(
    rows: Sequence[CorpusRow], compare: str, threshold: float | None
) -> tuple[list[int], list[Repeat]]:
    """Rows that stay and rows that go, by their numbers.

    Of rows that say the same the best rated stays, of equally rated the first. Rows are the same
    where their texts are equal after normalisation, or share at least `threshold` of their runs of
    words, directly or through others.

    Args:
        rows: of the corpus.
        compare: `all`, `prompt` or `response`.
        threshold: share of runs, over 0 and at most 1; None compares exactly.
    """
    texts = [view(item, compare) for item in rows]
    sets = RowSets(len(rows))
    join_equal(sets, texts)
    if threshold is not None:
        join_similar(sets, texts, threshold)
    stay, go = [], list[Repeat]()
    for members in sets.sets():
        best = min(members, key=lambda row: (-(rows[row].row.rating or 0), row))
        stay.append(best)
        if len(members) > 1:
            text = normalised(texts[best])
            exact = {row: normalised(texts[row]) == text for row in members if row != best}
            go += [Repeat(row, best, same) for row, same in exact.items()]
    return sorted(stay), sorted(go, key=lambda repeat: repeat.row)
