"""Read what a person types in a chat: messages and commands."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

BLOCK = '"""'
ReadLine = Callable[[str], str]
"""Takes what to show before the cursor and returns a line; raises `EOFError` at the end."""


@dataclass(frozen=True)
class Command:
    """A line that begins with a slash: its first word and what follows."""

    name: str
    rest: str


def read_entry(read_line: ReadLine, prompt: str, more: str) -> str | Command:
    """One message or command.

    A message of several lines stands between two lines with three quotation marks, or every line
    but its last ends with a backslash. Two slashes begin a message with one. Raises `EOFError`
    where the input ends before a message has begun.
    """
    line = read_line(prompt)
    if line.lstrip().startswith(BLOCK):
        return _block(read_line, more, line.lstrip()[len(BLOCK) :])
    if line.startswith("//"):
        return line[1:]
    if line.startswith("/"):
        name, _, rest = line[1:].strip().partition(" ")
        return Command(name.lower(), rest.strip())
    lines = []
    while line.endswith("\\"):
        lines.append(line[:-1])
        try:
            line = read_line(more)
        except EOFError:
            line = ""
    return "\n".join([*lines, line])


def _block(read_line: ReadLine, more: str, first: str) -> str:
    """The lines up to the closing marks, or up to the end of the input."""
    lines, line = list[str](), first
    while BLOCK not in line:
        lines.append(line)
        try:
            line = read_line(more)
        except EOFError:
            break
    else:
        lines.append(line.partition(BLOCK)[0])
    return "\n".join(lines).strip("\n")
