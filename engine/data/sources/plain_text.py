"""Read plain text and Markdown: a file is a document."""

from __future__ import annotations

from collections.abc import Iterator
from typing import BinaryIO

from engine.data.sources.streams.located import BadLine, Located, Position

_PIECE = 4 * 2**20
"""Characters of the longest document; a longer file is divided at the end of a line."""


def read_text(stream: BinaryIO, name: str) -> Iterator[Located | BadLine]:
    """The document in a file as a row with a `text`; of a very long file, several of them."""
    line, size, lines = 1, 0, list[bytes]()
    first = True
    while data := stream.readline(_PIECE):
        lines.append(data.removeprefix(b"\xef\xbb\xbf") if first else data)
        first = False
        size += len(data)
        if size >= _PIECE:
            whole, rest = _whole_characters(b"".join(lines))
            yield _document([whole], Position(name, line))
            line, size, lines = line + whole.count(b"\n"), len(rest), [rest]
    if any(part.strip() for part in lines):
        yield _document(lines, Position(name, line))


def _whole_characters(data: bytes) -> tuple[bytes, bytes]:
    """`data` without a character that it may have cut at its end, and that."""
    cut = len(data)
    while cut and len(data) - cut < 4 and data[cut - 1] >= 0x80:
        cut -= 1
        if data[cut] >= 0xC0:
            break
    return data[:cut], data[cut:]


def _document(lines: list[bytes], position: Position) -> Located | BadLine:
    data = b"".join(lines)
    try:
        text = data.decode("utf-8").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        at = position.after(data[: error.start].decode("utf-8"))
        fault = f"found the byte 0x{data[error.start]:02x}, which is not UTF-8"
        return BadLine(at, fault, "Save the file as UTF-8.")
    return Located(position, {"text": text})
