"""Rows of a data set by number, none of them in memory.

A plain file of JSON Lines is indexed where it is. Rows of any other source are first written to a
file of lines, one by one (`engine.data.streaming.converted`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt

from engine.data.dataset import RowChoice
from engine.data.rows import Row, is_row
from engine.data.sources.file_kinds import JSON
from engine.data.sources.resolve import RowFile
from engine.data.sources.streams.compressed import is_compressed
from engine.data.sources.streams.json_lines import BYTE_ORDER_MARK, parse_line
from engine.data.sources.streams.located import BadLine, Located, Position
from engine.data.streaming.converted import as_lines
from engine.data.streaming.line_index import LineIndex, index_lines
from engine.errors import DataError

_AROUND = 8
"""Bytes of a line besides its row: what ends it, and the mark that a file may begin with."""


@dataclass(frozen=True)
class IndexedFile:
    """One file of rows with its index; `spooled` where it was written from another source."""

    file: RowFile
    lines: LineIndex
    spooled: bool

    def value(self, number: int) -> Located | BadLine | None:
        """The value on one line, counted from 0; None for a blank line."""
        position, limit = Position(self.file.name, number + 1), self.file.limit
        # Rows that were written from another source were measured there, as they are spelt there.
        if not self.spooled and self.lines.size(number) > limit.most_bytes + _AROUND:
            return BadLine(position, limit.too_long, limit.advice)
        data = self.lines.line(number).rstrip(b"\r\n")
        if number == 0:
            data = data.removeprefix(BYTE_ORDER_MARK)
        if not data.strip():
            return None
        if not self.spooled:
            return parse_line(data, position, limit)
        line, *rest = json.loads(data)  # as `engine.data.streaming.converted` wrote it
        if len(rest) == 1:
            return Located(Position(self.file.name, line), rest[0])
        return BadLine(Position(self.file.name, line, rest[0]), rest[1], rest[2])


class IndexedRows:
    """The rows of several files.

    Args:
        files: where they are; their `origin` and `weight` go to the rows.
        choice: how values become rows.
        folder: where indices are remembered.
    """

    def __init__(self, files: Sequence[RowFile], choice: RowChoice, folder: Path) -> None:
        self.files = [_indexed(choice.limited(file), folder) for file in files]
        self._choice = choice
        counts = [file.lines.count for file in self.files]
        self._ends = np.cumsum(counts, dtype=np.int64)
        if self.count == 0:
            names = ", ".join(file.name for file in files)
            raise DataError(f"{names}: the data set is empty; expected at least one row.")

    @property
    def count(self) -> int:
        """How many rows there are, blank lines and bad rows among them."""
        return int(self._ends[-1])

    @property
    def spans(self) -> list[tuple[int, int, int, float]]:
        """First row, number of rows, origin and weight of every file."""
        starts = [0, *self._ends.tolist()]
        return [
            (start, file.lines.count, file.file.origin, file.file.weight)
            for start, file in zip(starts, self.files, strict=False)
        ]

    @cached_property
    def digest(self) -> str:
        """One SHA-256 of the content and the weights of all files, in order."""
        parts = [
            file.lines.digest + ("" if file.file.weight == 1.0 else f"*{file.file.weight:g}")
            for file in self.files
        ]
        return hashlib.sha256(" ".join(parts).encode()).hexdigest()

    def row(self, number: int) -> Row | BadLine | None:
        """One row, counted from 0; None for a blank line."""
        index = int(np.searchsorted(self._ends, number, side="right"))
        file = self.files[index]
        start = int(self._ends[index]) - file.lines.count
        value = file.value(number - start)
        return None if value is None else self._choice.parse(value, file.file)

    def rows(self, numbers: npt.NDArray[np.int64]) -> Iterator[Row | BadLine | None]:
        """Several rows, in the order asked for."""
        for number in numbers.tolist():
            yield self.row(number)


def _indexed(file: RowFile, folder: Path) -> IndexedFile:
    if _is_lines(file):
        return IndexedFile(file, index_lines(file.path, folder), spooled=False)
    path = as_lines(file, folder)
    index = index_lines(path, path.parent)
    return IndexedFile(replace(file, path=path), index, spooled=True)


def _is_lines(file: RowFile) -> bool:
    """Whether a file is plain JSON Lines, by its first line."""
    if file.kind != JSON or is_compressed(file.path):
        return False
    with file.path.open("rb") as stream:
        first = stream.readline(file.limit.most_bytes).removeprefix(BYTE_ORDER_MARK)
        while first and not first.strip():
            first = stream.readline(file.limit.most_bytes)
    value = parse_line(first.rstrip(b"\r\n"), Position(file.name, 1), file.limit)
    if isinstance(value, BadLine):
        return not first.lstrip().startswith((b"[", b"{\n", b"{\r"))
    return isinstance(value.value, dict) and is_row(value.value)
