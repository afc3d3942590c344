"""A position in a stream of JSON text, with line and column.

No more of the text is in memory than the value at the cursor, and that is bounded.
"""

from __future__ import annotations

import codecs
import re
from typing import Any, BinaryIO

import numpy as np

from engine.data.sources.streams.located import BadLine, Located, Position, RowLimit
from engine.storage import strict_json

_CHUNK = 1 << 18
_LONGEST_SCALAR = 512
"""Characters of a number or a word."""
_SPACE = re.compile(r"[ \t\r\n]*+")


class Broken(Exception):
    """Text that is not UTF-8 or not JSON."""

    def __init__(
        self, position: Position, fault: str, advice: str = "Fix or remove the row."
    ) -> None:
        super().__init__(fault)
        self.line = BadLine(position, fault, advice)


class JsonCursor:
    """A position in a text that is read as it is needed.

    Args:
        stream: of UTF-8 text, a byte order mark allowed.
        file: what positions call it.
        limit: of a value; a larger one is a `BadLine`.
        advice: what to do about what is broken.

    Every method raises `Broken` where the text turns out to be no UTF-8.
    """

    def __init__(self, stream: BinaryIO, file: str, limit: RowLimit, advice: str) -> None:
        self.position, self.advice = Position(file, 1), advice
        self._stream, self._limit = stream, limit
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self._text, self._offset = "", 0
        self._ended = False
        self._odd_byte: int | None = None

    def peek(self) -> str:
        """Skip white space and return the character there, or '' at the end of the text."""
        while True:
            match = _SPACE.match(self._text, self._offset)
            assert match is not None
            self._move(match.end())
            if self._offset < len(self._text):
                return self._text[self._offset]
            if not self._more(_CHUNK):
                return ""

    def step(self) -> str:
        """Step over one character and what white space follows, and return what stands there."""
        self._move(self._offset + 1)
        return self.peek()

    def value(self) -> Located | BadLine:
        """The value at the cursor, which steps over it. Raises `Broken`."""
        start, decoded = self.position, self._decoded()
        if decoded is None:
            size = self._find_end(self._limit.most_bytes)
            fault = self._limit.fault_of_text(self._text, self._offset, self._offset + size)
            if fault is not None:
                self.skip()
                return BadLine(start, fault, self._limit.advice)
            decoded = self._decoded(whole=True)
            assert decoded is not None
        value, end = decoded
        fault = self._limit.fault_of_text(self._text, self._offset, end)
        self._move(end)
        return Located(start, value) if fault is None else BadLine(start, fault, self._limit.advice)

    def skip(self) -> None:
        """Step over the value at the cursor, of any size. Raises `Broken` where it has no end."""
        decoded = self._decoded() if self.peek() else None
        if decoded is not None:
            self._move(decoded[1])
            return
        if self.peek() not in ("[", "{", '"'):
            self.value()
            return
        depth, in_string = 0, False
        while True:
            piece = self._piece(0)
            end, depth, in_string = _end_of_value(piece, depth, in_string)
            self._move(self._offset + end)
            if depth == 0 and not in_string:
                return
            if self._offset >= len(self._text) - 1 and not self._more(_CHUNK):
                raise Broken(self.position, "broken JSON: the value has no end", self.advice)

    def _find_end(self, most: int) -> int:
        """How long the value at the cursor is, which is read; over `most` where that is enough.

        At the end of the text it is as long as that.
        """
        if self._text[self._offset] not in '[{"':
            self._more(_LONGEST_SCALAR)
            return 0
        size, depth, in_string = 0, 0, False
        while size <= most:
            piece = self._piece(size)
            end, depth, in_string = _end_of_value(piece, depth, in_string)
            size += end
            if depth == 0 and not in_string:
                return size
            if self._offset + size >= len(self._text) - 1 and not self._more(max(_CHUNK, size)):
                return len(self._text) - self._offset
        return size

    def _piece(self, start: int) -> str:
        """Some of the text so far behind the cursor, without half an escape at its end."""
        piece = self._text[self._offset + start : self._offset + start + _CHUNK + 2]
        return piece[:-1] if (len(piece) - len(piece.rstrip("\\"))) % 2 else piece

    def next_line(self) -> None:
        """Step to the beginning of the next line, or to the end of the text."""
        while True:
            end = self._text.find("\n", self._offset)
            self._move(len(self._text) if end < 0 else end + 1)
            if end >= 0 or not self._more(_CHUNK):
                return

    def end(self, what: str) -> None:
        """Step over what closes `what`. Raises `Broken` where anything stands behind it."""
        if self.step():
            fault = f"broken JSON: something follows the end of the {what}"
            raise Broken(self.position, fault, "Remove it, or use JSON Lines.")

    def _decoded(self, whole: bool = False) -> tuple[Any, int] | None:
        """The value at the cursor and where it ends; None where more of the text is needed."""
        whole = whole or (self._ended and self._odd_byte is None)
        try:
            if whole:
                return strict_json.decode(self._text, self._offset)
            decoded = strict_json.begin(self._text, self._offset)
        except strict_json.JSONFault as fault:
            at = self.position.after(self._text[self._offset : fault.position])
            raise Broken(at, f"broken JSON: {fault.message}", self.advice) from None
        return None if decoded is None or decoded[1] == len(self._text) else decoded

    def _move(self, offset: int) -> None:
        self.position = self.position.after(self._text[self._offset : offset])
        self._offset = offset

    def _more(self, size: int) -> bool:
        """Read on, and forget what stands before the cursor; False at the end."""
        if self._odd_byte is not None:
            at = self.position.after(self._text[self._offset :])
            fault = f"found the byte 0x{self._odd_byte:02x}, which is not UTF-8"
            raise Broken(at, fault, "Save the file as UTF-8.")
        if self._ended:
            return False
        data = self._stream.read(size)
        try:
            text = self._decoder.decode(data, final=not data)
            self._ended = not data
        except UnicodeDecodeError as error:
            text = error.object[: error.start].decode("utf-8")
            self._odd_byte, self._ended = error.object[error.start], True
        self._text, self._offset = self._text[self._offset :] + text, 0
        # Half a character at the end is found when nothing follows: the next call says so.
        return bool(data) or self._odd_byte is not None


def _end_of_value(text: str, depth: int, in_string: bool) -> tuple[int, int, bool]:
    """Where a value ends that goes on in `text`, or the end of that; depth and state there.

    A character at a time would take a second for every megabyte of brackets.
    """
    plain = text.replace("\\\\", "  ").replace('\\"', "  ")
    marks = np.frombuffer(plain.encode("utf-32-le", "surrogatepass"), dtype="<u4")
    quotes = marks == ord('"')
    inside = (np.cumsum(quotes) + in_string) % 2 == 1  # of the character after this one
    outside = ~inside & ~quotes
    opened = (marks == ord("[")) | (marks == ord("{"))
    closed = (marks == ord("]")) | (marks == ord("}"))
    depths = depth + np.cumsum(outside * (opened.astype(np.int64) - closed))
    ends = np.flatnonzero((depths == 0) & ~inside & (closed | quotes))
    if len(ends):
        return int(ends[0]) + 1, 0, False
    return (len(text), int(depths[-1]), bool(inside[-1])) if text else (0, depth, in_string)
