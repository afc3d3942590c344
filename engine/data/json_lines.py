"""Read JSON values with their positions from a file.

The file is JSON Lines or one array, plain or gzipped. The first character that is not white space
tells which: '[' begins an array. A line that is broken does not hide the lines after it; a broken
array ends there.
"""

import gzip
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

from engine.errors import DataError
from engine.storage import strict_json

MAX_ROW_BYTES = 16 * 2**20
"""A longer line, or array element, is refused: it is a damaged file more often than a row."""

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_ARRAY_ADVICE = "The rest of a broken array cannot be read; fix the file or use JSON Lines."


@dataclass(frozen=True)
class Position:
    """A position in a file; line and column count from 1, columns in characters."""

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
    """A JSON value and the position of its first character (for a line, of the line)."""

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


class _Broken(Exception):
    """Text that is not UTF-8 or not JSON."""

    def __init__(
        self, position: Position, fault: str, advice: str = "Fix or remove the row."
    ) -> None:
        super().__init__(fault)
        self.line = BadLine(position, fault, advice)


def read_values(path: Path) -> Iterator[Located | BadLine]:
    """Every value of one file in order; a bad line comes as a `BadLine`.

    Raises:
        DataError: the file cannot be read, or is an array that is broken.
    """
    try:
        with _open(path) as stream:
            is_array = _is_array(stream)
            stream.seek(0)
            if is_array:
                yield from _read_array(stream, str(path))
            else:
                yield from _read_lines(stream, str(path))
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(
            f"{path}: the file cannot be read ({error}). Check that it is complete, readable, "
            "and, if its name ends in .gz, really compressed with gzip."
        ) from error


def _open(path: Path) -> BinaryIO:
    if path.name.lower().endswith(".gz"):
        return cast(BinaryIO, gzip.open(path, "rb"))
    return path.open("rb")


def _is_array(stream: BinaryIO) -> bool:
    while block := stream.read(4096):
        text = block.removeprefix(_BYTE_ORDER_MARK).lstrip()
        if text:
            return text.startswith(b"[")
    return False


def _read_lines(stream: BinaryIO, file: str) -> Iterator[Located | BadLine]:
    number = 0
    while line := stream.readline(MAX_ROW_BYTES + 2):
        number += 1
        position = Position(file, number)
        if len(line.rstrip(b"\r\n")) > MAX_ROW_BYTES:
            while line and not line.endswith(b"\n"):
                line = stream.readline(MAX_ROW_BYTES)
            yield BadLine(position, "the line is longer than 16 MiB", "Split or shorten the row.")
            continue
        if number == 1:
            line = line.removeprefix(_BYTE_ORDER_MARK)
        if not line.strip():
            continue
        try:
            yield Located(position, _parse_line(line.rstrip(b"\r\n"), position))
        except _Broken as broken:
            yield broken.line


def _parse_line(line: bytes, position: Position) -> Any:
    text = _to_text(line, position)
    try:
        return strict_json.loads(text)
    except strict_json.JSONFault as fault:
        at = position.after(text[: fault.position])
        advice = "In JSON Lines each line is one complete JSON object; fix or remove this one."
        raise _Broken(at, f"broken JSON: {fault.message}", advice) from None


def _to_text(data: bytes, start: Position) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        at = start.after(data[: error.start].decode("utf-8"))
        fault = f"found the byte 0x{data[error.start]:02x}, which is not UTF-8"
        raise _Broken(at, fault, "Save the file as UTF-8.") from None


def _read_array(stream: BinaryIO, file: str) -> Iterator[Located | BadLine]:
    start = Position(file, 1)
    try:
        text = _to_text(stream.read().removeprefix(_BYTE_ORDER_MARK), start)
        yield from _array_values(text, start)
    except _Broken as broken:
        raise DataError(str(broken.line)) from None


def _array_values(text: str, start: Position) -> Iterator[Located | BadLine]:
    """Read the array element by element, so that every one knows its line."""
    cursor = _Cursor(text, start)
    cursor.move(text.index("[") + 1)
    if cursor.peek() == "]":
        cursor.end()
        return
    while True:
        cursor.peek()
        position, offset = cursor.position, cursor.offset
        try:
            value, end = strict_json.decode(text, offset)
        except strict_json.JSONFault as fault:
            cursor.move(fault.position)
            raise _Broken(cursor.position, f"broken JSON: {fault.message}", _ARRAY_ADVICE) from None
        if end - offset > MAX_ROW_BYTES:
            yield BadLine(position, "the row is longer than 16 MiB", "Split or shorten the row.")
        else:
            yield Located(position, value)
        cursor.move(end)
        mark = cursor.peek()
        if mark == "]":
            cursor.end()
            return
        if mark != ",":
            fault_text = "broken JSON: expected ',' or ']' after this element of the array"
            raise _Broken(cursor.position, fault_text, _ARRAY_ADVICE)
        cursor.move(cursor.offset + 1)


class _Cursor:
    """A position in a text that knows its line and column."""

    def __init__(self, text: str, start: Position) -> None:
        self.text, self.position, self.offset = text, start, 0

    def move(self, offset: int) -> None:
        self.position = self.position.after(self.text[self.offset : offset])
        self.offset = offset

    def peek(self) -> str:
        """Skip white space and return the character there, or '' at the end of the text."""
        offset = self.offset
        while self.text[offset : offset + 1] in (" ", "\t", "\r", "\n"):
            offset += 1
        self.move(offset)
        return self.text[offset : offset + 1]

    def end(self) -> None:
        """Step over the closing bracket and refuse anything behind it."""
        self.move(self.offset + 1)
        if self.peek():
            fault = "broken JSON: something follows the end of the array"
            raise _Broken(self.position, fault, "Remove it, or use JSON Lines.")
