"""Cells of tables and databases as the values that rows have.

A table knows types that JSON does not, and a CSV file none at all: numbers, dates and identifiers
become the text that they are written as, a rating or a weight becomes a number, a cell that holds a
list or an object as JSON text becomes that.
"""

from __future__ import annotations

import datetime
import decimal
import math
import uuid
from collections.abc import Mapping
from typing import Any

from engine.storage import strict_json

NUMBERS = ("rating", "schema_version")
_JSON_COLUMNS = (
    "messages", "conversations", "conversation", "history", "tools", "functions", "input_ids",
    "labels", "attention_mask", "chosen", "rejected",
)  # fmt: skip
_OPTIONAL = ("category", *NUMBERS, *_JSON_COLUMNS)
"""Columns whose empty cells mean that there is no value."""


class CellFault(ValueError):
    """A cell that no row can hold."""


def cell(column: str, value: Any) -> Any:
    """The value of one cell. Raises `CellFault` for bytes."""
    name = column.lower()
    if isinstance(value, str):
        return _from_text(name, value)
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    if isinstance(value, bytes | bytearray | memoryview):
        raise CellFault(f"the column {column!r} holds bytes; text was expected")
    if name in NUMBERS and isinstance(value, decimal.Decimal | float) and value == int(value):
        return int(value)
    if name in NUMBERS and isinstance(value, int):
        return value
    if isinstance(value, list | tuple | dict):
        return without_nulls(value)
    return str(plain(value))


def plain(value: Any) -> Any:
    """A value as JSON has it; dates and times in ISO form, other objects as their text."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, datetime.timedelta | decimal.Decimal | uuid.UUID):
        return str(value)
    return value


def without_nulls(value: Any) -> Any:
    """Lists and mappings without the keys that have no value.

    A column of a table gives every mapping the keys of all of them: those that a row does not have
    come as null, and would be arguments of its tool calls.
    """
    if isinstance(value, Mapping):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list | tuple):
        return [without_nulls(item) for item in value]
    return value if isinstance(value, bool) or value is None else _jsonable(value)


def _jsonable(value: Any) -> Any:
    if isinstance(value, str | int | float):
        return value
    return str(plain(value))


def _from_text(name: str, value: str) -> Any:
    text = value.strip()
    if not text:
        return None if name in _OPTIONAL else value
    if name in NUMBERS:
        try:
            number = float(text)
        except ValueError:
            return value
        return int(number) if math.isfinite(number) and number == int(number) else value
    if name in _JSON_COLUMNS and text[0] in "[{":
        try:
            return strict_json.loads(text)
        except ValueError:
            return value
    return value
