"""A value or a bad row, and where it stands."""

import re
from dataclasses import dataclass
from typing import Any

from engine.config.row_settings import MAX_ROW_BYTES

_BYTES_PER_CONTAINER = 32
_STRINGS = re.compile(r'"[^"\\]*+(?:\\.[^"\\]*+)*+"?', re.DOTALL)


@dataclass(frozen=True)
class RowLimit:
    """How large a row may be: a larger one is a damaged file more often than a row.

    A byte of JSON can become a hundred bytes of objects, so a row may have one object, list or key
    for each 32 of the bytes it may have.
    """

    most_bytes: int = MAX_ROW_BYTES

    @property
    def too_long(self) -> str:
        """What is wrong with a row of more bytes."""
        mebibytes = self.most_bytes / 2**20
        size = f"{mebibytes:.4g} MiB" if mebibytes >= 1 else f"{self.most_bytes:,} bytes"
        return f"the row is longer than {size}"

    @property
    def advice(self) -> str:
        """What to do about a row that is too large."""
        return "Split or shorten the row, or allow larger ones with --max-row-bytes."

    def fault_of_text(self, text: str, start: int = 0, end: int | None = None) -> str | None:
        """What is wrong with the size of the JSON value text[start:end]; None for nothing."""
        end = len(text) if end is None else end
        if end - start > self.most_bytes:
            return self.too_long
        most = self.most_bytes // _BYTES_PER_CONTAINER
        if end - start <= most or _containers(text, start, end) <= most:
            return None
        if _containers(_STRINGS.sub("", text[start:end])) <= most:
            return None
        return f"the row has more than {most:,} objects, lists and keys"


ROW_LIMIT = RowLimit()
"""The limit of a row where none is asked for."""


def _containers(text: str, start: int = 0, end: int | None = None) -> int:
    """Objects, lists and keys of a JSON text, and marks that look so inside strings."""
    return sum(text.count(mark, start, end) for mark in "[{:")


@dataclass(frozen=True)
class Position:
    """A position in a file; line and column count from 1, columns in characters.

    In what has no lines (a table, a database) the line is the number of the row.
    """

    file: str
    line: int
    column: int = 1

    def __str__(self) -> str:
        return f"{self.file}:{self.line}:{self.column}"

    def after(self, text: str) -> "Position":
        """The position reached by reading `text` from here."""
        newlines = text.count("\n")
        if newlines == 0:
            return Position(self.file, self.line, self.column + len(text))
        return Position(self.file, self.line + newlines, len(text) - text.rfind("\n"))


@dataclass(frozen=True)
class Located:
    """A value and the position of its first character (for a line, of the line)."""

    position: Position
    value: Any


@dataclass(frozen=True)
class BadLine:
    """Something that cannot be used as a row: where, what was found, and what to do."""

    position: Position
    fault: str
    advice: str

    def __str__(self) -> str:
        return f"{self.position}: {self.fault}. {self.advice}"
