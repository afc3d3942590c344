"""Rows from a Python program: a list, a generator, or a function."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from engine.errors import ConfigError

PREFIX = "python:"
Rows = Iterable[Mapping[str, Any]] | Callable[[], Iterable[Mapping[str, Any]]]

_given: dict[str, Rows] = {}


def remember(rows: Rows) -> str:
    """A name for rows, by which settings mean them. Raises `ValueError` for what has no rows."""
    if hasattr(rows, "columns") and hasattr(rows, "to_dict"):
        raise ValueError("is a table; give its rows: frame.to_dict('records')")
    if not callable(rows) and not hasattr(rows, "__iter__"):
        raise ValueError(f"is {type(rows).__name__}; expected a path, a URL, or rows as mappings")
    for name, known in _given.items():
        if known is rows:
            return name
    name = f"{PREFIX}rows-{len(_given) + 1}"
    _given[name] = rows
    return name


def given_rows(name: str) -> Iterator[Mapping[str, Any]]:
    """The rows of a name. Raises `ConfigError` where this process was given none by that name."""
    if name not in _given:
        raise ConfigError(
            f"The rows {name} came from a Python program and are not stored. Go on from Python, "
            "with the same rows: engine.resume(run, data=rows)."
        )
    rows = _given[name]
    return iter(rows() if callable(rows) else rows)
