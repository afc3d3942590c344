"""Divide rows so that what is alike stays on one side."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

from engine.data.corpus.reading import CorpusRow
from engine.data.corpus.similar import (
    RowSets,
    join_equal,
    join_similar,
    normalised,
    view,
)
from engine.errors import DataError


def linked_rows(
    rows: Sequence[CorpusRow], group_by: str | None, threshold: float | None
) -> list[list[int]]:
    """Sets of rows that belong on one side.

    Args:
        rows: of the corpus.
        group_by: key of the rows whose equal values belong together; None for no such key.
        threshold: rows are linked whose prompts, answers or whole texts share this part of their
            runs of words; None links only rows with equal prompts.

    Raises:
        DataError: no row has the key.
    """
    sets = RowSets(len(rows))
    if group_by is not None:
        values = [_value(item.record, group_by) for item in rows]
        if all(value is None for value in values):
            keys = sorted({key for item in rows for key in item.record})
            raise DataError(f"No row has the key '{group_by}' to group by; they have {keys}.")
        join_equal(sets, ["" if value is None else str(value) for value in values])
    join_equal(sets, [view(item, "prompt") for item in rows])
    join_equal(sets, [view(item, "all") for item in rows])
    if threshold is not None:
        join_similar(sets, [view(item, "all") for item in rows], threshold)
        join_similar(sets, [view(item, "prompt") for item in rows], threshold)
        answers = [view(item, "response") for item in rows]
        # Short answers ("Yes.") are equal by nature, and say nothing about their questions.
        long = [text if len(text.split()) >= _LONG_ANSWER else "" for text in answers]
        join_similar(sets, long, threshold)
    return sets.sets()


_LONG_ANSWER = 12


def split_rows(
    rows: Sequence[CorpusRow], sets: Sequence[Sequence[int]], shares: dict[str, float], seed: int
) -> dict[str, list[int]]:
    """Row numbers of each side; the first side takes what no other has space for.

    Args:
        rows: of the corpus.
        sets: rows that stay together.
        shares: side -> its share of the rows, the first side's last of all.
        seed: another one gives another division. The order of the rows gives none: a set goes by
            the hash of its texts.

    Raises:
        DataError: a side is left empty, for a set of linked rows is larger than its share.
    """
    first, *others = shares
    space = {side: round(shares[side] * len(rows)) for side in others}
    chosen: dict[str, list[int]] = {side: [] for side in shares}
    for members in sorted(sets, key=lambda members: _order(rows, members, seed)):
        side = next((s for s in others if len(chosen[s]) + len(members) <= space[s]), first)
        chosen[side] += members
    empty = [side for side, members in chosen.items() if not members]
    if empty:
        largest = max(map(len, sets))
        raise DataError(
            f"No rows are left for {', '.join(empty)}: of {len(rows):,} rows the largest set that "
            f"belongs together has {largest:,}. Give it a larger share, another --group-by, or a "
            "higher --threshold."
        )
    return {side: sorted(members) for side, members in chosen.items()}


def _order(rows: Sequence[CorpusRow], members: Sequence[int], seed: int) -> str:
    texts = min(normalised(view(rows[row], "all")) for row in members)
    text = f"{seed}\n{texts}".encode("utf-8", "surrogatepass")
    return hashlib.sha256(text).hexdigest()


def _value(record: dict[str, Any], key: str) -> Any:
    value: Any = record
    if key in record:
        return record[key]
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value
