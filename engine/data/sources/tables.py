"""Read CSV and TSV files with any usual delimiter."""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from engine.data.sources.cells import cell
from engine.data.sources.file_kinds import delimiter_of
from engine.data.sources.streams.located import BadLine, Located, Position, RowLimit
from engine.errors import DataError

_LONG = "A quote that is never closed swallows what follows it."


class _LongLine(Exception):
    """A row has grown beyond what one may have."""


class _Lines:
    """The lines of a text, counted; a row may not grow without end."""

    def __init__(self, text: io.TextIOWrapper, limit: RowLimit) -> None:
        self._text, self.limit, self.number, self.size = text, limit, 0, 0

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = self._text.readline(self.limit.most_bytes)
        if not line:
            raise StopIteration
        self.number += 1
        self.size += len(line)
        if self.size > self.limit.most_bytes:
            raise _LongLine
        return line


def read_table(
    stream: BinaryIO, path: Path, name: str, limit: RowLimit
) -> Iterator[Located | BadLine]:
    """The rows of a table with a line of column names, as mappings.

    Bytes that are not UTF-8 make their row a `BadLine`, and so does a row with more or fewer cells
    than columns. Raises `DataError` where the first line names no columns.
    """
    csv.field_size_limit(limit.most_bytes)
    text = io.TextIOWrapper(stream, "utf-8-sig", errors="surrogateescape", newline="")
    try:
        yield from _rows(_Lines(text, limit), path, name)
    finally:
        text.detach()  # whoever opened the stream closes it


def _rows(lines: _Lines, path: Path, name: str) -> Iterator[Located | BadLine]:
    first = next(lines, "")
    while first and not first.strip():
        first = next(lines, "")
    delimiter = delimiter_of(path, first)
    if first.strip().lower().startswith("sep=") and len(first.strip()) == 5:
        delimiter, first = first.strip()[4], next(lines, "")
    columns = _columns(first, lines, delimiter, name)
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    while True:
        position, lines.size = Position(name, lines.number + 1), 0
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield BadLine(position, f"found broken CSV ({error})", "Fix its quotes, or remove it.")
            continue
        except _LongLine:
            yield BadLine(position, lines.limit.too_long, f"{lines.limit.advice} {_LONG}")
            continue
        if any(cells):
            yield _row(columns, cells, position)


def _columns(first: str, lines: _Lines, delimiter: str, name: str) -> list[str]:
    def rest() -> Iterator[str]:
        yield first
        yield from lines

    try:
        columns = [column.strip() for column in next(csv.reader(rest(), delimiter=delimiter), [])]
    except (csv.Error, _LongLine) as error:
        raise DataError(f"{name}:1: the line of column names is broken ({error}).") from None
    refuse_repeated(columns, name)
    if not any(columns):
        raise DataError(f"{name}: the table is empty; expected a line of column names and rows.")
    return columns


def refuse_repeated(columns: list[str], name: str) -> None:
    """Raise `DataError` where two columns have one name."""
    counts = Counter(column for column in columns if column)
    repeated = [repr(column) for column, count in counts.items() if count > 1]
    if repeated:
        raise DataError(
            f"{name}: several columns are called {', '.join(repeated)}, so that it is not known "
            "which of them is meant. Rename or remove all but one."
        )


def _row(columns: list[str], cells: list[str], position: Position) -> Located | BadLine:
    wrong = next((value for value in cells if not value.isascii() and _broken(value)), None)
    if wrong is not None:
        byte = next(ord(mark) - 0xDC00 for mark in wrong if 0xDC80 <= ord(mark) <= 0xDCFF)
        fault = f"found the byte 0x{byte:02x}, which is not UTF-8"
        return BadLine(position, fault, "Save the file as UTF-8.")
    if len(cells) != len(columns):
        fault = f"found {len(cells)} cells where the table has {len(columns)} columns"
        return BadLine(position, fault, "Put texts with the delimiter in them between quotes.")
    named = zip(columns, cells, strict=True)
    return Located(position, {column: cell(column, value) for column, value in named if column})


def _broken(value: str) -> bool:
    try:
        value.encode()
    except UnicodeEncodeError:
        return True
    return False
