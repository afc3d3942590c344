"""Fill the fields of a row from the columns that --map names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from engine.data.rows.fields import RowFault, listed

_CONTENT = frozenset(
    {
        "messages", "conversations", "conversation", "prompt", "instruction", "question", "query",
        "problem", "response", "output", "completion", "answer", "solution", "text", "chosen",
        "rejected", "input_ids", "labels", "attention_mask", "input", "context", "history",
    }
)  # fmt: skip
"""Keys that say what is learnt: where a map says it, those of the row itself do not count."""


def with_columns(
    raw: Mapping[str, Any], columns: Mapping[str, str], unused: set[str]
) -> dict[str, Any]:
    """The row with its fields under their own names.

    What says nothing about what is learnt (a rating, a system prompt, tools) stays. A column may be
    a path into objects, `output.text`. Keys that nothing reads are added to `unused`. Raises
    `RowFault` for a column that is not there.
    """
    mapped = {field: _value(raw, column) for field, column in columns.items()}
    read = {column.partition(".")[0] for column in columns.values()} | set(columns.values())
    rest = {key: value for key, value in raw.items() if key not in mapped}
    unused |= {
        key
        for key, value in raw.items()
        if key not in read and value is not None and (key in _CONTENT or key in mapped)
    }
    plain = {k: v for k, v in rest.items() if k not in _CONTENT and k not in read}
    return {**plain, **{field: value for field, value in mapped.items() if value is not None}}


def _value(raw: Mapping[str, Any], column: str) -> Any:
    if column in raw:
        return raw[column]
    value: Any = raw
    for part in column.split("."):
        if not isinstance(value, Mapping) or part not in value:
            raise RowFault(f"no column {column!r}, which --map names; the row has {listed(raw)}")
        value = value[part]
    return value
