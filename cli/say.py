"""Print others' text so that it cannot steer the terminal."""

from __future__ import annotations

import sys

from engine.errors import without_controls


def say(*values: object, sep: str = " ", end: str = "\n", flush: bool = False) -> None:
    """`print` of what may hold others' text: names, rows, settings cannot steer the terminal."""
    print(without_controls(sep.join(map(str, values))), end=end, flush=flush)


def say_answer(text: str, end: str = "\n", flush: bool = False) -> None:
    """`print` of a model's words: as they are into a file or a pipe, as `say` on a terminal."""
    shown = without_controls(text) if sys.stdout.isatty() else text
    print(shown, end=end, flush=flush)
