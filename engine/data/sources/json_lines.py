"""Read JSON values with their positions from a file.

The file is JSON Lines, one array, one object that holds the array or a table by columns, or JSON
values printed over several lines; plain or gzipped. The first character that is not white space
tells which: '[' begins an array, and a first line that is no whole value begins one of several
lines. A line that is broken does not hide the lines after it; a broken array ends there.
"""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from engine.data.sources.column_tables import rows_of_columns
from engine.data.sources.compressed import open_plain
from engine.data.sources.located import MAX_ROW_BYTES, BadLine, Located, Position
from engine.errors import DataError
from engine.storage import strict_json

MAX_WRAPPED_BYTES = 2**30
"""A longer file is read line by line, or as an array."""

BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_HEAD_BYTES = 4096
_ARRAY_ADVICE = "The rest of a broken array cannot be read; fix the file or use JSON Lines."
_IsRow = Callable[[Mapping[str, Any]], bool]


class _Broken(Exception):
    """Text that is not UTF-8 or not JSON."""

    def __init__(
        self, position: Position, fault: str, advice: str = "Fix or remove the row."
    ) -> None:
        super().__init__(fault)
        self.line = BadLine(position, fault, advice)


def read_json(path: Path, name: str, is_row: _IsRow) -> Iterator[Located | BadLine]:
    """Every value of a file of JSON in order; a bad line comes as a `BadLine`.

    Args:
        path: of the file.
        name: what positions call it.
        is_row: whether an object is a row; one that is not and holds a single list of objects
            stands for the rows in that list.

    Raises:
        DataError: the file is an array that is broken.
    """
    with open_plain(path) as stream:
        head = stream.read(_HEAD_BYTES)
    with open_plain(path) as stream:
        if head.removeprefix(BYTE_ORDER_MARK).lstrip().startswith(b"["):
            yield from _read_array(stream, name)
            return
        start = _several_lines(stream, name, is_row)
        if start is not None:
            yield from start
            return
    with open_plain(path) as stream:
        yield from _read_lines(stream, name)


def _several_lines(
    stream: BinaryIO, file: str, is_row: _IsRow
) -> Iterator[Located | BadLine] | None:
    """Values that are printed over several lines, or rows inside one object; else None."""
    first, blank = stream.readline(MAX_ROW_BYTES).removeprefix(BYTE_ORDER_MARK), b""
    while first and not first.strip():
        if len(blank) > MAX_ROW_BYTES:
            return None
        blank += first
        first = stream.readline(MAX_ROW_BYTES)
    if not first.lstrip().startswith(b"{") or len(first) >= MAX_ROW_BYTES:
        return None
    value = _whole(first)
    rows = rows_of_columns(value)
    if rows is not None and not stream.read(_HEAD_BYTES).strip():
        return _numbered(rows, file)
    if isinstance(value, dict) and (is_row(value) or _list_of_rows(value) is None):
        return None
    data = blank + first + stream.read(MAX_WRAPPED_BYTES + 1)
    if len(data) > MAX_WRAPPED_BYTES:
        return None
    try:
        text = data.decode("utf-8")
        values = _sequence(text, Position(file, 1))
    except (UnicodeDecodeError, strict_json.JSONFault):
        return None
    only = values[0] if len(values) == 1 else None
    rows = rows_of_columns(only.value) if isinstance(only, Located) else None
    if rows is not None:
        return _numbered(rows, file)
    if isinstance(only, Located) and isinstance(only.value, dict) and not is_row(only.value):
        key = _list_of_rows(only.value)
        if key is not None:
            return _wrapped(text, key, Position(file, 1))
    return iter(values)


def _numbered(rows: list[dict[str, Any]], file: str) -> Iterator[Located | BadLine]:
    """Rows of a table: their line is their number."""
    for index, row in enumerate(rows, start=1):
        yield Located(Position(file, index), row)


def _whole(line: bytes) -> Any:
    """The value that a line is, or None."""
    try:
        return strict_json.loads(line.decode("utf-8"))
    except (UnicodeDecodeError, strict_json.JSONFault):
        return None


def _list_of_rows(value: Mapping[str, Any]) -> str | None:
    """The key of the only list of objects in an object, or None."""
    keys = [
        key
        for key, inner in value.items()
        if isinstance(inner, list) and inner and all(isinstance(item, dict) for item in inner)
    ]
    return keys[0] if len(keys) == 1 else None


def _sequence(text: str, start: Position) -> list[Located | BadLine]:
    """JSON values one after the other, with any white space between them."""
    cursor = _Cursor(text, start)
    values: list[Located | BadLine] = []
    while cursor.peek():
        value, end = strict_json.decode(text, cursor.offset)
        values.append(_checked(Located(cursor.position, value), end - cursor.offset))
        cursor.move(end)
    return values


def _wrapped(text: str, key: str, start: Position) -> Iterator[Located | BadLine]:
    """The rows of the list under `key` of the object that a text is; it was read once already."""
    cursor = _Cursor(text, start)
    cursor.peek()
    while True:
        cursor.step()  # over the brace or the comma
        name, end = strict_json.decode(text, cursor.offset)
        cursor.move(end)
        cursor.peek()
        cursor.step()  # over the colon
        if name == key:
            return _array_values(cursor)
        cursor.move(strict_json.decode(text, cursor.offset)[1])
        cursor.peek()


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
            line = line.removeprefix(BYTE_ORDER_MARK)
        if not line.strip():
            continue
        yield parse_line(line.rstrip(b"\r\n"), position)


def parse_line(line: bytes, position: Position) -> Located | BadLine:
    """One line of JSON Lines, without what ends it, as a value or as what is wrong with it."""
    try:
        return Located(position, _parsed(line, position))
    except _Broken as broken:
        return broken.line


def _parsed(line: bytes, position: Position) -> Any:
    text = _to_text(line, position)
    try:
        return strict_json.loads(text)
    except strict_json.JSONFault as fault:
        at = position.after(text[: fault.position])
        raise _Broken(at, f"broken JSON: {fault.message}", _line_advice(text, fault)) from None


def _line_advice(text: str, fault: strict_json.JSONFault) -> str:
    """What to do with a line that is not JSON, by what it looks like."""
    rest = text[fault.position :].lstrip()
    if rest.startswith(("'", "None", "True", "False")):
        return "This is Python, not JSON: write rows with json.dumps(row)."
    if rest == "," and text[0] in "{[":
        return "In JSON Lines no comma stands between the lines; remove it."
    if text[0] not in "{[" and "," in text:
        return "If this is a CSV file, call it .csv."
    return "In JSON Lines each line is one complete JSON object; fix or remove this one."


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
        text = _to_text(stream.read().removeprefix(BYTE_ORDER_MARK), start)
        cursor = _Cursor(text, start)
        cursor.move(text.index("["))
        yield from _array_values(cursor)
        cursor.end()
    except _Broken as broken:
        raise DataError(str(broken.line)) from None


def _array_values(cursor: "_Cursor") -> Iterator[Located | BadLine]:
    """Read the array at the cursor element by element, so that every one knows its line."""
    mark = cursor.step()
    while mark != "]":
        position, begin = cursor.position, cursor.offset
        try:
            value, end = strict_json.decode(cursor.text, begin)
        except strict_json.JSONFault as fault:
            cursor.move(fault.position)
            raise _Broken(cursor.position, f"broken JSON: {fault.message}", _ARRAY_ADVICE) from None
        yield _checked(Located(position, value), end - begin)
        cursor.move(end)
        mark = cursor.peek()
        if mark == ",":
            cursor.step()
        elif mark != "]":
            fault_text = "broken JSON: expected ',' or ']' after this element of the array"
            raise _Broken(cursor.position, fault_text, _ARRAY_ADVICE)


def _checked(value: Located, size: int) -> Located | BadLine:
    if size <= MAX_ROW_BYTES:
        return value
    return BadLine(value.position, "the row is longer than 16 MiB", "Split or shorten the row.")


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

    def step(self) -> str:
        """Step over one character and what white space follows, and return what stands there."""
        self.move(self.offset + 1)
        return self.peek()

    def end(self) -> None:
        """Step over the closing bracket and refuse anything behind it."""
        if self.step():
            fault = "broken JSON: something follows the end of the array"
            raise _Broken(self.position, fault, "Remove it, or use JSON Lines.")
