"""Write the rows of any source in a shape of one's choice."""

from __future__ import annotations

from collections.abc import Sequence

from engine.data.corpus.reading import CorpusRow
from engine.data.corpus.records import Record, shaped
from engine.data.rows.fields import RowFault


def convert_rows(rows: Sequence[CorpusRow], shape: str) -> tuple[list[Record], list[str]]:
    """Rows in a shape, and `file:line: reason` of each that the shape cannot say."""
    written, refused = [], list[str]()
    for item in rows:
        try:
            written.append(shaped(item.record, item.row, shape))
        except RowFault as fault:
            refused.append(f"{item.row.source}: found {fault}")
    return written, refused
