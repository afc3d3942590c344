"""A value or a bad row, and where it stands."""

from dataclasses import dataclass
from typing import Any

MAX_ROW_BYTES = 16 * 2**20
"""A longer line, or array element, is refused: it is a damaged file more often than a row."""


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
