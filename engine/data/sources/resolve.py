"""The files that data names mean, and the rows in them."""

from __future__ import annotations

import glob
import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from engine.config.data_names import DataName
from engine.config.data_names.given_rows import PREFIX
from engine.config.data_names.passwords import hide_password
from engine.data.sources.arrow import read_arrow
from engine.data.sources.database import check_database, is_database, spooled_query
from engine.data.sources.file_kinds import (
    ARROW,
    CSV,
    DATA_SUFFIXES,
    JSON,
    PARQUET,
    TEXT,
    TEXT_SUFFIXES,
    advice,
    kind_of,
    plain_suffix,
    with_article,
)
from engine.data.sources.hub import HubData, of_split
from engine.data.sources.plain_text import read_text
from engine.data.sources.spool import spooled_python, spooled_standard_input
from engine.data.sources.streams.compressed import READ_ERRORS, open_plain
from engine.data.sources.streams.json_lines import read_json
from engine.data.sources.streams.located import ROW_LIMIT, BadLine, Located, RowLimit
from engine.data.sources.tables import read_table
from engine.errors import DataError
from engine.storage.home import expanded

log = logging.getLogger(__name__)

STANDARD_INPUT = "-"
_MOST_ENTRIES = 100_000
_ABOUT_DATA = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
"""Files that `datasets` writes beside rows."""
_HEAD_BYTES = 4096
Names = str | Path | Sequence[str | Path]


@dataclass(frozen=True)
class RowFile:
    """A file of rows.

    Attributes:
        path: where it is; of rows that come only once, where they were written to.
        name: what is shown of it.
        origin: which of the data names it belongs to, from 0.
        weight: how often its rows are read in an epoch.
        limit: how large a row may be.
    """

    path: Path
    name: str
    origin: int = 0
    weight: float = 1.0
    limit: RowLimit = ROW_LIMIT

    @property
    def kind(self) -> str:
        """What the file is, by its content. Raises `DataError` where it cannot be read."""
        try:
            with open_plain(self.path) as stream:
                return kind_of(self.path, stream.read(_HEAD_BYTES))
        except READ_ERRORS as error:
            raise self._unreadable(error) from error

    def values(self, is_row: Callable[[Mapping[str, Any]], bool]) -> Iterator[Located | BadLine]:
        """Every value in order; what is no row comes as a `BadLine`.

        `is_row` tells an object that is a row from one that holds the rows. Raises `DataError` for
        a file that cannot be read at all.
        """
        kind = self.kind
        try:
            if kind == JSON:
                yield from read_json(self.path, self.name, is_row, self.limit)
            elif kind in (PARQUET, ARROW):
                yield from read_arrow(self.path, kind, self.name)
            elif kind in (CSV, TEXT):
                with open_plain(self.path) as stream:
                    yield from (
                        read_table(stream, self.path, self.name, self.limit)
                        if kind == CSV
                        else read_text(stream, self.name)
                    )
            else:
                raise DataError(
                    f"{self.name}: this is {with_article(kind)} file, and data files here are "
                    "JSON, CSV, TSV, Parquet, Arrow or text, plain or compressed. "
                    f"{advice(self.path, kind)}."
                )
        except READ_ERRORS as error:
            raise self._unreadable(error) from error

    def _unreadable(self, error: BaseException) -> DataError:
        return DataError(
            f"{self.name}: the file cannot be read ({error}). Check that it is complete, "
            "readable, and, if its name ends in .gz, really compressed with gzip."
        )


def data_files(names: Names, query: str | None = None) -> list[RowFile]:
    """The files that names mean, with the rows of databases and of Python written to files.

    Args:
        names: paths, folders, patterns, hub ids, URLs of databases, `-`, rows from Python; each
            with `=WEIGHT` after it, or without.
        query: which rows of the databases among them.

    Raises:
        DataError: something does not exist, or holds no rows.
        ConfigError: a database cannot be asked.
    """
    listed = [names] if isinstance(names, str | Path) else list(names)
    if not listed:
        raise DataError("No data file was given; name a .jsonl or .json file, or a folder.")
    files: list[RowFile] = []
    databases = 0
    for origin, text in enumerate(listed):
        name = DataName.parse(hide_password(str(text)))
        databases += is_database(name.text)
        files += [
            RowFile(path, shown, origin, name.weight) for path, shown in _files(name.text, query)
        ]
    if query is not None and not databases:
        raise DataError(
            "--query says which rows of a database to read, and no --data is one. A database is "
            "named by its URL, such as sqlite:///app.db."
        )
    return files


def _files(text: str, query: str | None) -> list[tuple[Path, str]]:
    """The files that one name means, and what is shown of each."""
    if text == STANDARD_INPUT:
        return [(spooled_standard_input(), "standard input")]
    if text.startswith(PREFIX):
        return [(spooled_python(text), text)]
    if is_database(text):
        check_database(text, query)
        assert query is not None
        return [(spooled_query(text, query), text)]
    path = expanded(text)
    if path.is_file():
        return [(path, text)]
    if path.is_dir():
        return [(file, str(file)) for file in _in_folder(path)]
    if glob.has_magic(text):
        return [(file, str(file)) for file in _matching(text)]
    hub = HubData.parse(text)
    if hub is not None:
        return [(file, f"{hub.repository}/{file.name}") for file in hub.files()]
    if _exists(path):
        raise DataError(
            f"{path} is a pipe, a socket or a device, and rows are read several times. Write them "
            "to a file, or give them on standard input: --data -."
        )
    raise DataError(
        f"{path}: there is no such data file; expected JSON, CSV, TSV, Parquet, Arrow or text, "
        "plain or compressed, a folder or a pattern of them, the URL of a database, or the id of "
        f"a data set of the hub. {_what_it_may_be(text)}"
    )


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # a name that is too long, or holds a zero byte
        return False


def _what_it_may_be(name: str) -> str:
    """What to do about a name of no file, by what it looks like."""
    parts = [part.strip() for part in name.split(",")]
    if len(parts) > 1 and all(Path(part).exists() for part in parts):
        return f"Several are named one by one: --data {' --data '.join(parts)}."
    if re.match(r"(https?|ftp|s3|gs):/", name):
        return "Data is not fetched from the network: download the file and name it."
    return "Check the path."


def _matching(pattern: str) -> list[Path]:
    files = sorted(Path(name) for name in glob.glob(pattern, recursive=True))  # noqa: PTH207 - may be absolute
    files = [file for file in files if file.is_file()]
    if not files:
        raise DataError(f"{pattern}: no file matches this pattern. Check it, and its quotes.")
    return files


def _in_folder(folder: Path) -> list[Path]:
    """The files of a folder that rows are trained on: those called `train`, else all but others'.

    Text files count only where there are no others: beside data they are its description.
    """
    if (folder / "config.json").exists():
        raise DataError(
            f"{folder}: the folder holds a model and no rows. Name the rows with --data, and the "
            "model with --model."
        )
    entries = list(islice(folder.rglob("*"), _MOST_ENTRIES + 1))
    if len(entries) > _MOST_ENTRIES:
        raise DataError(
            f"{folder}: over {_MOST_ENTRIES:,} files are in the folder and below it, which is no "
            "folder of rows. Name the folder that the rows are in, or a pattern of their files."
        )
    names = [
        str(path.relative_to(folder))
        for path in sorted(entries)
        if path.is_file() and not path.name.startswith(".") and path.name not in _ABOUT_DATA
    ]
    data = [name for name in names if plain_suffix(Path(name)) in DATA_SUFFIXES]
    data = data or [name for name in names if plain_suffix(Path(name)) in TEXT_SUFFIXES]
    chosen = of_split(data, "train")
    if not chosen:
        shown = ", ".join(data[:8]) or "none"
        raise DataError(
            f"{folder}: the folder has no files to train on (data files: {shown}). Name the files "
            "to read."
        )
    if len(data) > 1:
        log.info("%s: %d of %d data files are read", folder, len(chosen), len(data))
    return [folder / name for name in chosen]
