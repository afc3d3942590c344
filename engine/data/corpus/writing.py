"""Write rows as JSON Lines or Parquet, whole or not at all."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, BinaryIO, cast

from engine.data.corpus.records import Record
from engine.data.origins import manifest_path
from engine.errors import ConfigError, DataError
from engine.storage import durable, names
from engine.storage.home import real
from engine.storage.standing import has_keys, refuse_foreign, refuse_unwritable

_JSON_LINES = (".jsonl", ".ndjson", ".jsonl.gz")
_GROUP = 10_000
_FIGURES = has_keys("read", "examples"), has_keys("tool", "read", "left_out", "figures")
"""Tests of files: reports of `data validate`, and of the tools that make rows."""


def refuse_output(*outputs: Path | None, overwrite: bool = False) -> None:
    """Refuse an output that cannot be written, before any work is done.

    What a writer that was killed left of them is cleared away first. Raises `ConfigError` for one
    that exists, without `overwrite`, and for an unknown ending.
    """
    named = [output for output in outputs if output is not None]
    for output in named:
        durable.sweep_leftovers(output)
    for output in named:
        if not output.name.lower().endswith((*_JSON_LINES, ".parquet")):
            raise ConfigError(
                f"{output}: rows are written as .jsonl, .jsonl.gz or .parquet; name the output so."
            )
        if output.exists() and not output.is_file():
            raise ConfigError(
                f"{output} is no file: a folder, a pipe or a device is not replaced. Nothing was "
                "written; name another output."
            )
        if os.path.lexists(output) and not overwrite:
            raise ConfigError(
                f"{output} exists already. Nothing was written; name another output, or replace it "
                "with --overwrite."
            )
        refuse_foreign(manifest_path(output), has_keys("tool", "output"), "a manifest")
        refuse_unwritable(output)  # before another output gets its name
    refuse_equal(*outputs)


def refuse_report(report: Path | None, *outputs: Path | None, overwrite: bool = False) -> None:
    """Refuse a file for figures that another output has, or that holds anything but figures.

    Figures that stand there are replaced. Raises `ConfigError`.
    """
    manifests = [None if output is None else manifest_path(output) for output in outputs]
    refuse_equal(report, *outputs, *manifests)
    if report is not None:
        refuse_foreign(
            report, lambda path: any(test(path) for test in _FIGURES), "a report", overwrite
        )


def refuse_equal(*outputs: Path | None) -> None:
    """Raise `ConfigError` where two outputs are one file."""
    files = [real(output.parent) / output.name for output in outputs if output is not None]
    if len(set(files)) < len(files):
        raise ConfigError("Two outputs have one name; every one needs its own.")


def write_records(output: Path, rows: Iterable[Record]) -> int:
    """Write rows in the format that the name's ending says, and return their number.

    The folder is made if it is missing. An old manifest of the output is removed: it speaks of
    other rows.

    Raises:
        CheckpointError: the file cannot be written.
        DataError: Parquet without pyarrow.
    """
    with durable.writing(output):
        names.mkdir(output.parent, parents=True, exist_ok=True)
    count = 0
    with durable.replacing(output) as handle:
        if output.name.lower().endswith(".parquet"):
            count = _write_parquet(handle, list(rows))
        else:
            zipped = output.name.lower().endswith(".gz")
            # Without a name and a time in the header equal rows are equal bytes.
            stream = gzip.GzipFile("", "wb", 6, handle, mtime=0) if zipped else handle
            for row in rows:
                cast(BinaryIO, stream).write(json_line(row))
                count += 1
            if zipped:
                stream.close()
    names.unlink(manifest_path(output), missing_ok=True)
    return count


def json_line(row: Any) -> bytes:
    """A value as one line of JSON in UTF-8; half characters are escaped."""
    try:
        return (json.dumps(row, ensure_ascii=False) + "\n").encode()
    except UnicodeEncodeError:
        return (json.dumps(row) + "\n").encode()


def _write_parquet(handle: BinaryIO, rows: Sequence[Record]) -> int:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise DataError(
            "Parquet is written with pyarrow, which is not installed: pip install "
            "'engine-trainer[data]', or name an output that ends in .jsonl."
        ) from None
    names = list(dict.fromkeys(key for row in rows for key in row))
    columns = {name: _column([row.get(name) for row in rows]) for name in names}
    try:
        table = pyarrow.table(columns)
    except (pyarrow.ArrowException, UnicodeEncodeError, OverflowError) as error:
        raise DataError(
            f"The rows hold what Parquet cannot ({error}); name an output that ends in .jsonl."
        ) from None
    pyarrow.parquet.write_table(table, handle, row_group_size=_GROUP)
    return len(rows)


def _column(values: list[Any]) -> list[Any]:
    """The values of a column that one type of Arrow can hold, else as JSON text.

    Objects with different keys are text: as a struct each would get the keys of all of them.
    """
    present = [value for value in values if value is not None]
    for kind in (str, bool, int, float):
        if all(type(value) is kind for value in present):
            return values
    if all(isinstance(value, list) for value in present):
        items = [item for value in present for item in value]
        if any(all(type(item) is kind for item in items) for kind in (str, int)):
            return values
        if all(_is_flat(item) for item in items) and len({tuple(item) for item in items}) == 1:
            return values
    return [None if v is None else v if type(v) is str else json.dumps(v) for v in values]


def _is_flat(item: Any) -> bool:
    return isinstance(item, dict) and all(type(value) is str for value in item.values())
