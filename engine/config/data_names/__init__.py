"""How settings name data: paths, URLs, hub ids, rows from Python."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator

from engine.config.data_names.given_rows import remember
from engine.config.data_names.passwords import URL, hide_password

ROW_FIELDS = (
    "messages", "prompt", "response", "input", "context", "history", "system", "tools", "text",
    "chosen", "rejected", "label", "input_ids", "labels", "attention_mask", "category", "rating",
    "schema_version",
)  # fmt: skip
"""Fields of a row that `map` can fill from a column of another name."""

_WEIGHT = re.compile(r"(?P<name>.+)=(?P<weight>[0-9]+(?:\.[0-9]*)?|\.[0-9]+)", re.DOTALL)
_FRAGMENT = "#weight="
_MOST = 1000.0


@dataclass(frozen=True)
class DataName:
    """One source of rows, and how often its rows are read in an epoch."""

    text: str
    weight: float = 1.0

    @classmethod
    def parse(cls, text: str) -> DataName:
        """`rows.jsonl`, or `rows.jsonl=0.5`; a URL with options has its weight as `#weight=0.5`.

        Raises `ValueError` for a weight out of range.
        """
        name, mark, number = text.rpartition(_FRAGMENT)
        if mark:
            return cls(name, _weight(number))
        match = _WEIGHT.fullmatch(text)
        options = URL.match(text) and "?" in text
        if match is None or options or Path(text).exists():
            return cls(text)
        return cls(match["name"], _weight(match["weight"]))

    def __str__(self) -> str:
        if self.weight == 1.0:
            return self.text
        sign = _FRAGMENT if URL.match(self.text) else "="
        return f"{self.text}{sign}{self.weight:g}"


def _weight(text: Any) -> float:
    try:
        weight = float(text)
    except (TypeError, ValueError):
        weight = 0.0
    if not 0 < weight <= _MOST:
        raise ValueError(f"the weight {text!r} should be a number over 0 and at most {_MOST:g}")
    return weight


def data_names(value: Any) -> Any:
    """Data as users give it, as a tuple of names: no password in them, rows by a name of theirs."""
    if value is None:
        return ()
    if isinstance(value, str | Path | Mapping) or callable(value):
        return (_one(value),)
    if isinstance(value, list | tuple):
        if value and all(isinstance(item, Mapping) and not _is_name(item) for item in value):
            return (remember(value),)
        return tuple(_one(item) for item in value)
    return (_one(value),)


def _one(value: Any) -> str:
    if isinstance(value, str | Path):
        text = hide_password(str(value))
        DataName.parse(text)
        return text
    if isinstance(value, Mapping):
        if not _is_name(value):
            raise ValueError("a list should name sources of rows, or be the rows; not both")
        return str(DataName(hide_password(str(value["path"])), _weight(value.get("weight", 1))))
    return remember(value)


def _is_name(value: Mapping[Any, Any]) -> bool:
    return "path" in value and set(value) <= {"path", "weight"}


def column_map(value: Any) -> Any:
    """`"prompt=question,response=answer"`, or a mapping: which column a field of a row is."""
    if isinstance(value, str):
        pairs = [part.partition("=") for part in value.split(",") if part.strip()]
        if any(not sign or not column.strip() for _, sign, column in pairs):
            raise ValueError("should be of the form prompt=question,response=answer")
        value = {field.strip(): column.strip() for field, _, column in pairs}
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        return value
    for field in value:
        if field not in ROW_FIELDS:
            near = get_close_matches(str(field), ROW_FIELDS, n=1, cutoff=0.75)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ValueError(f"a row has no field {field!r}, only {', '.join(ROW_FIELDS)}{hint}")
    return dict(value)


DataNames = Annotated[tuple[str, ...], BeforeValidator(data_names)]
"""Sources of rows, by name."""

ColumnMap = Annotated[dict[str, str], BeforeValidator(column_map)]
"""Field of a row -> column of the data."""
