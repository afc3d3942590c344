"""Two texts side by side, row by row while both are written."""

from __future__ import annotations

import textwrap
import unicodedata
from collections.abc import Callable

from engine.errors import without_controls

_GAP = " │ "
_NARROWEST = 24


class TwoColumns:
    """Writes two growing texts beside each other; a row is written once both have it.

    Where the terminal is too narrow for two columns they are written one below the other.

    Args:
        write: takes text to show.
        titles: of the two texts.
        width: of the terminal, in cells.
    """

    def __init__(self, write: Callable[[str], None], titles: tuple[str, str], width: int) -> None:
        self._write, self._titles = write, titles
        self._cells = (width - len(_GAP)) // 2
        self._texts, self._ended = ["", ""], [False, False]
        self._rows = 0
        self._beside = self._cells >= _NARROWEST
        if self._beside:
            self._row(*titles)
            self._row("─" * self._cells, "─" * self._cells)

    def add(self, column: int, text: str) -> None:
        """More of one text."""
        self._texts[column] += without_controls(text)
        self._show()

    def end(self, column: int) -> None:
        """One text is whole."""
        self._ended[column] = True
        self._show()
        if all(self._ended) and not self._beside:
            for title, whole in zip(self._titles, self._texts, strict=True):
                self._write(f"[{title}]\n{whole.rstrip()}\n\n")

    def _show(self) -> None:
        if not self._beside:
            return
        lines = [self._lines(0), self._lines(1)]
        ready = [
            len(own) if ended else len(own) - 1
            for own, ended in zip(lines, self._ended, strict=True)
        ]
        certain = [
            max(map(len, lines)) if ended else count
            for count, ended in zip(ready, self._ended, strict=True)
        ]
        while self._rows < min(certain):
            row = self._rows
            self._row(*(own[row] if row < len(own) else "" for own in lines))
            self._rows += 1

    def _lines(self, column: int) -> list[str]:
        """A text in lines of the column's width; the last may still grow."""
        return [
            line
            for paragraph in self._texts[column].split("\n")
            for line in wrapped(paragraph, self._cells)
        ]

    def _row(self, left: str, right: str) -> None:
        self._write(f"{left}{' ' * (self._cells - cells(left))}{_GAP}{right}\n")


def cells(text: str) -> int:
    """How wide a text is on a terminal."""
    return sum(
        0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1
        for c in text
    )


def wrapped(text: str, width: int) -> list[str]:
    """A paragraph in lines of at most `width` cells; an empty one is an empty line."""
    text = text.expandtabs(4)
    if cells(text) == len(text):
        return textwrap.wrap(
            text, width, drop_whitespace=False, replace_whitespace=False
        ) or [""]  # fmt: skip
    lines, line = list[str](), ""
    for character in text:
        if cells(line + character) > width:
            lines.append(line)
            line = ""
        line += character
    return [*lines, line]
