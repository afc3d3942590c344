"""Rows of a job of forge, and where they come from."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from engine.data.docstrings import write_docstrings
from engine.data.rows import Row
from engine.errors import CheckpointError, ConfigError
from engine.storage import durable

DOMAINS = ("docstrings",)
"""Data sets by name: docstrings are those of the installed Python's standard library."""


def files_of_domain(domain: str | None, folder: Path) -> list[Path]:
    """The files of a data set: one to split, or one to train on and one to hold out.

    `domain` is a name, a file, or a folder that has both; None has no files of its own.
    """
    if domain is None:
        return []
    if domain == "docstrings":
        train, _, heldout, _ = write_docstrings(folder / "docstrings")
        return [train, heldout]
    return domain_files(domain)


def domain_files(domain: str) -> list[Path]:
    """The one or two files of a data set that is named by a path. Raises `ConfigError`."""
    path = Path(domain)
    if path.is_file():
        return [path]
    files = [path / "train.jsonl", path / "heldout.jsonl"]
    if not all(file.is_file() for file in files):
        raise ConfigError(
            f"--domain is {domain!r}; expected {', '.join(DOMAINS)}, a file of rows, or a folder "
            "with a train.jsonl and a heldout.jsonl."
        )
    return files


def refuse_changed(file: Path, digest: object) -> None:
    """Raise `CheckpointError` for rows of the job that are not as it wrote them."""
    if durable.sha256_file(file) != digest:
        raise CheckpointError(
            f"{file} is not as this job wrote it, so that its models would not be of the same "
            "rows. Bring it back, or begin anew in another --output-dir."
        )


def lines_of(path: Path) -> list[str]:
    """The lines of a file of rows."""
    return path.read_text(encoding="utf-8").splitlines()


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    """Write rows as conversations, one on each line. Raises `CheckpointError`."""
    lines = []
    for row in rows:
        tools = {} if row.tools is None else {"tools": row.tools}
        lines.append(json.dumps({"messages": row.messages, **tools}, ensure_ascii=False) + "\n")
    durable.write_text(path, "".join(lines))


def prompt_of(row: Row) -> str | None:
    """A row's question, where it is a plain one: one user message with a text."""
    asked = [message["content"] for message in row.messages if message["role"] == "user"]
    return asked[0] if len(asked) == 1 and isinstance(asked[0], str) else None
