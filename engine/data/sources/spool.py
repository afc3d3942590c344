"""Write rows that come only once into a file of this process.

They come from a database, a Python program, or standard input.

Everything after this reads a file, as often as it likes: counting, hashing, shuffling. The file is
the reader's alone (mode 0600) and is removed when the process ends.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from collections.abc import Iterable, Mapping
from functools import cache
from itertools import count
from pathlib import Path
from typing import Any

from engine.config.data_names.given_rows import given_rows
from engine.data.sources.cells import plain
from engine.errors import ConfigError, DataError


@cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="engine-rows-")


_numbers = count(1)


def new_file(stem: str) -> Path:
    """The name of a new file that goes with this process."""
    return Path(_folder().name) / f"{stem}-{next(_numbers)}.jsonl"


def write_rows(rows: Iterable[Mapping[str, Any]], what: str) -> Path:
    """Write rows as JSON Lines into a new file, and return where.

    Args:
        rows: mappings of JSON values; dates, decimals and the like become texts.
        what: what errors call the source.

    Raises:
        DataError: something is no mapping, or holds what JSON cannot.
    """
    path = new_file("rows")
    number = 0
    with path.open("x", encoding="utf-8", errors="surrogatepass") as file:
        for row in rows:
            number += 1
            if not isinstance(row, Mapping):
                raise DataError(
                    f"{what}, row {number}: found {type(row).__name__}, where a mapping such as "
                    "{'prompt': ..., 'response': ...} was expected."
                )
            try:
                file.write(json.dumps(dict(row), ensure_ascii=False, default=_other) + "\n")
            except (TypeError, ValueError) as error:
                raise DataError(
                    f"{what}, row {number} cannot be written as JSON ({error}). Rows hold text, "
                    "numbers, lists and mappings."
                ) from None
    return path


def _other(value: Any) -> Any:
    """What JSON has no word for: numpy's numbers and arrays, dates, decimals, mappings."""
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, Mapping):
        return dict(value)
    changed = plain(value)
    if changed is value:
        raise TypeError(f"{type(value).__name__} is no JSON value")
    return changed


@cache
def spooled_python(name: str) -> Path:
    """The rows that a Python program gave, as a file; they are asked for once."""
    return write_rows(given_rows(name), f"the rows {name}")


@cache
def spooled_standard_input() -> Path:
    """Standard input as a file; it is read once, to its end.

    Raises `ConfigError` where it is a terminal.
    """
    if sys.stdin is None or sys.stdin.isatty():
        raise ConfigError(
            "--data - reads rows from standard input, which is a terminal here. Pipe rows into it: "
            "zcat rows.jsonl.gz | engine train --data - ..."
        )
    path = Path(_folder().name) / "standard-input"
    with path.open("xb") as file:
        shutil.copyfileobj(sys.stdin.buffer, file, 1 << 20)
    return path


def is_spooled(path: Path) -> bool:
    """Whether a file was written here, and ends with the process."""
    return _folder.cache_info().currsize > 0 and path.parent == Path(_folder().name)
