"""Rows of a table that one JSON object holds by its columns."""

from __future__ import annotations

from typing import Any


def rows_of_columns(value: Any) -> list[dict[str, Any]] | None:
    """The rows of `{"prompt": ["a", "b"], "response": ["c", "d"]}`; None for anything else.

    So pandas and `datasets` write a table as one object; pandas may number the cells of a column
    (`{"prompt": {"0": "a", "1": "b"}}`). Columns have equal lengths, and at least one holds texts
    or lists: an object of equally long lists of numbers is a row of token ids, and a list of
    objects is one row's messages.
    """
    if not isinstance(value, dict) or not value:
        return None
    columns = [_cells(column) for column in value.values()]
    lengths = {None if cells is None else len(cells) for cells in columns}
    if None in lengths or len(lengths) != 1 or lengths == {0}:
        return None
    known = [cells for cells in columns if cells is not None]
    if any(all(isinstance(cell, dict) for cell in cells) for cells in known):
        return None
    if not any(all(isinstance(cell, str | list) for cell in cells) for cells in known):
        return None
    return [dict(zip(value, cells, strict=True)) for cells in zip(*known, strict=True)]


def _cells(column: Any) -> list[Any] | None:
    """The cells of a column that is a list, or an object with the numbers of rows as keys."""
    if isinstance(column, list):
        return column
    if isinstance(column, dict) and list(column) == [str(i) for i in range(len(column))]:
        return list(column.values())
    return None
