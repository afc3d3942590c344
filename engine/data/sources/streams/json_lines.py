"""Read JSON values with their positions from a file.

The file is JSON Lines, one array, one object that holds the array or a table by columns, or JSON
values printed over several lines; plain or compressed. The first character that is not white space
tells which: '[' begins an array, and a first line that is no whole value begins one of several
lines. A line that is broken does not hide the lines after it; a broken array ends there. Only a
table by columns is in memory whole; of everything else, one row.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from engine.data.sources.streams.column_tables import rows_of_columns
from engine.data.sources.streams.compressed import is_compressed, open_plain
from engine.data.sources.streams.json_cursor import Broken, JsonCursor
from engine.data.sources.streams.located import ROW_LIMIT, BadLine, Located, Position, RowLimit
from engine.errors import DataError
from engine.storage import strict_json

_MAX_TABLE_BYTES, _MAX_COMPRESSED_TABLE_BYTES = 2**30, 2**26

BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_HEAD_BYTES = 4096
_PIECE = 1 << 20
_SHORT = 64
_ARRAY_ADVICE = "The rest of a broken array cannot be read; fix the file or use JSON Lines."
_LINE_ADVICE = "In JSON Lines each line is one complete JSON object; fix or remove this one."
_IsRow = Callable[[Mapping[str, Any]], bool]


def read_json(
    path: Path, name: str, is_row: _IsRow, limit: RowLimit = ROW_LIMIT
) -> Iterator[Located | BadLine]:
    """Every value of a file of JSON in order; a bad line comes as a `BadLine`.

    Args:
        path: of the file.
        name: what positions call it.
        is_row: whether an object is a row; one that is not and holds a single list of objects
            stands for the rows in that list.
        limit: how large a row may be.

    Raises:
        DataError: the file is an array that is broken.
    """
    with open_plain(path) as stream:
        head = stream.read(_HEAD_BYTES)
    if head.removeprefix(BYTE_ORDER_MARK).lstrip().startswith(b"["):
        with open_plain(path) as stream:
            yield from _whole_array(JsonCursor(stream, name, limit, _ARRAY_ADVICE))
        return
    with open_plain(path) as stream:
        first, more = _first_line(stream, limit)
    value = _whole(first, limit) if first else None
    table = None if more else rows_of_columns(value)
    if table is not None:
        yield from _numbered(table, name)
        return
    is_line = value is not None and (is_row(value) or _list_of_rows(value) is None)
    if first.startswith(b"{") and not is_line:
        values = _first_values(path, name, is_row, limit)
        if values is not None:
            yield from values
            return
    with open_plain(path) as stream:
        yield from _read_lines(stream, name, limit)


def _first_line(stream: BinaryIO, limit: RowLimit) -> tuple[bytes, bool]:
    """The first line that is not blank, or so much of it as a row has, and whether more follows."""
    line = stream.readline(limit.most_bytes).removeprefix(BYTE_ORDER_MARK)
    blank = 0
    while line and not line.strip() and blank <= limit.most_bytes:
        blank += len(line)
        line = stream.readline(limit.most_bytes)
    return line.strip(), bool(stream.read(_HEAD_BYTES).strip())


def _first_values(
    path: Path, name: str, is_row: _IsRow, limit: RowLimit
) -> Iterator[Located | BadLine] | None:
    """Values printed over several lines, or rows inside one object; None if the first is broken."""
    with open_plain(path) as stream:
        cursor = JsonCursor(stream, name, limit, _LINE_ADVICE)
        try:
            cursor.peek()
            first = cursor.value()
            following = cursor.peek()
        except Broken:
            return None
    if following not in ("", "{", "["):
        return None
    if following:
        return _sequence(path, name, limit)
    if isinstance(first, BadLine):
        return _large_object(path, name, is_row, limit)
    table = rows_of_columns(first.value)
    if table is not None:
        return _numbered(table, name)
    value = first.value
    key = _list_of_rows(value) if isinstance(value, dict) and not is_row(value) else None
    return iter([first]) if key is None else _rows_inside(path, name, key, limit)


def _numbered(rows: list[dict[str, Any]], file: str) -> Iterator[Located | BadLine]:
    """Rows of a table: their line is their number."""
    for index, row in enumerate(rows, start=1):
        yield Located(Position(file, index), row)


def _whole(line: bytes, limit: RowLimit) -> Any:
    """The object that a line is, or None."""
    item = parse_line(line, Position("", 1), limit)
    return item.value if isinstance(item, Located) and isinstance(item.value, dict) else None


def _list_of_rows(value: Mapping[str, Any]) -> str | None:
    """The key of the only list of objects in an object, or None."""
    keys = [
        key
        for key, inner in value.items()
        if isinstance(inner, list) and inner and all(isinstance(item, dict) for item in inner)
    ]
    return keys[0] if len(keys) == 1 else None


def _sequence(path: Path, name: str, limit: RowLimit) -> Iterator[Located | BadLine]:
    """JSON values one after the other, with any white space between them."""
    with open_plain(path) as stream, _broken_ends():
        cursor = JsonCursor(stream, name, limit, _LINE_ADVICE)
        while cursor.peek():
            try:
                value = cursor.value()
            except Broken as broken:
                yield broken.line
                cursor.next_line()
            else:
                yield value


def _rows_inside(path: Path, name: str, key: str, limit: RowLimit) -> Iterator[Located | BadLine]:
    """The rows of the list under `key` of the object that a file is."""
    with open_plain(path) as stream, _broken_ends():
        cursor = JsonCursor(stream, name, limit, _ARRAY_ADVICE)
        cursor.peek()
        for member in _members(cursor):
            if member == key:
                for _ in _elements(cursor):
                    yield cursor.value()
                cursor.step()
            else:
                cursor.skip()


def _large_object(
    path: Path, name: str, is_row: _IsRow, limit: RowLimit
) -> Iterator[Located | BadLine]:
    """The rows of an object that is larger than one row."""
    lists = list[str]()
    with open_plain(path) as stream, _broken_ends():
        cursor = JsonCursor(stream, name, limit, _ARRAY_ADVICE)
        cursor.peek()
        for member in _members(cursor):
            mark = cursor.peek()
            if is_row({member: None}):
                if mark in ("[", "{"):
                    return _large_table(path, name, limit)
                return iter([BadLine(Position(name, 1), limit.too_long, limit.advice)])
            if mark != "[":
                cursor.skip()
                continue
            for number, mark in enumerate(_elements(cursor)):
                if number == 0 and mark == "{":
                    lists.append(member)
                cursor.skip()
            cursor.step()
    if len(lists) == 1:
        return _rows_inside(path, name, lists[0], limit)
    return _large_table(path, name, limit)


def _large_table(path: Path, name: str, limit: RowLimit) -> Iterator[Located | BadLine]:
    """The rows of a large table by columns, or one bad line for what is none."""
    most = _MAX_COMPRESSED_TABLE_BYTES if is_compressed(path) else _MAX_TABLE_BYTES
    data = bytearray()
    with open_plain(path) as stream:  # in pieces: read(n) takes room for n bytes beforehand
        while len(data) <= most and (piece := stream.read(_PIECE)):
            data += piece
    table = None
    if len(data) <= most:
        whole = RowLimit(max(len(data), limit.most_bytes))
        table = rows_of_columns(_whole(bytes(data.removeprefix(BYTE_ORDER_MARK)), whole))
    if table is not None:
        return _numbered(table, name)
    return iter([BadLine(Position(name, 1), limit.too_long, limit.advice)])


def _read_lines(stream: BinaryIO, file: str, limit: RowLimit) -> Iterator[Located | BadLine]:
    number = 0
    while line := stream.readline(limit.most_bytes + 2):
        number += 1
        if len(line) < _SHORT and line.isspace():
            continue
        position = Position(file, number)
        if len(line.rstrip(b"\r\n")) > limit.most_bytes:
            while line and not line.endswith(b"\n"):
                line = stream.readline(limit.most_bytes)
            yield BadLine(position, limit.too_long, limit.advice)
            continue
        if number == 1:
            line = line.removeprefix(BYTE_ORDER_MARK)
        if not line.strip():
            continue
        yield parse_line(line.rstrip(b"\r\n"), position, limit)


def parse_line(line: bytes, position: Position, limit: RowLimit) -> Located | BadLine:
    """One line of JSON Lines, without what ends it, as a value or as what is wrong with it."""
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        at = position.after(line[: error.start].decode("utf-8"))
        fault = f"found the byte 0x{line[error.start]:02x}, which is not UTF-8"
        return BadLine(at, fault, "Save the file as UTF-8.")
    too_large = limit.too_long if len(line) > limit.most_bytes else limit.fault_of_text(text)
    if too_large is not None:
        return BadLine(position, too_large, limit.advice)
    try:
        return Located(position, strict_json.loads(text))
    except strict_json.JSONFault as broken:
        at = position.after(text[: broken.position])
        return BadLine(at, f"broken JSON: {broken.message}", _line_advice(text, broken))


def _line_advice(text: str, fault: strict_json.JSONFault) -> str:
    """What to do with a line that is not JSON, by what it looks like."""
    rest = text[fault.position :].lstrip()
    if rest.startswith(("'", "None", "True", "False")):
        return "This is Python, not JSON: write rows with json.dumps(row)."
    if rest == "," and text[0] in "{[":
        return "In JSON Lines no comma stands between the lines; remove it."
    if text[0] not in "{[" and "," in text:
        return "If this is a CSV file, call it .csv."
    return _LINE_ADVICE


def _members(cursor: JsonCursor) -> Iterator[str]:
    """The keys of the object at the cursor, which is at the value of each when it is yielded."""
    mark = cursor.step()
    while mark != "}":
        key = cursor.value() if mark == '"' else None
        if not isinstance(key, Located) or cursor.peek() != ":":
            raise Broken(cursor.position, "broken JSON: expected a key and ':'", cursor.advice)
        cursor.step()
        yield str(key.value)
        mark = cursor.peek()
        if mark == ",":
            mark = cursor.step().replace("}", ",")
        elif mark != "}":
            fault = "broken JSON: expected ',' or '}' after this value of the object"
            raise Broken(cursor.position, fault, cursor.advice)


def _elements(cursor: JsonCursor) -> Iterator[str]:
    """The first character of each element of the array at the cursor, whose user steps over it."""
    mark = cursor.step()
    while mark != "]":
        yield mark
        mark = cursor.peek()
        if mark == ",":
            mark = cursor.step().replace("]", ",")
        elif mark != "]":
            fault = "broken JSON: expected ',' or ']' after this element of the array"
            raise Broken(cursor.position, fault, cursor.advice)


@contextmanager
def _broken_ends() -> Iterator[None]:
    """Turn what is broken into a `DataError`: nothing behind it can be read."""
    try:
        yield
    except Broken as broken:
        raise DataError(str(broken.line)) from None


def _whole_array(cursor: JsonCursor) -> Iterator[Located | BadLine]:
    """Read the array element by element, so that every one knows its line."""
    with _broken_ends():
        cursor.peek()
        for _ in _elements(cursor):
            yield cursor.value()
        cursor.end("array")
