"""Rows of any source as a file of lines, made once.

Each line is `[line, value]`, or `[line, column, fault, advice]` for what is no row. Such a file is
used again only for the same path, size, time of change and reading code; there is one for a source,
which only its owner reads. What comes only once (a database, standard input, a program's rows) is
not remembered: it may be other rows the next time.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from engine.data import rows, sources
from engine.data.rows import is_row
from engine.data.sources.resolve import RowFile
from engine.data.sources.spool import is_spooled, new_file
from engine.data.sources.streams.located import Located
from engine.errors import DataError
from engine.storage import durable, names
from engine.storage.safe_files import json_object_or_empty

log = logging.getLogger(__name__)


def as_lines(file: RowFile, folder: Path) -> Path:
    """The file of lines of a source, in `folder` or, where it is not remembered, of this process.

    Raises `DataError` where the source cannot be read.
    """
    if is_spooled(file.path):
        path = new_file("lines")
        with path.open("xb") as plain:
            plain.writelines(_lines(file))
        return path
    try:
        facts = _facts(file.path) | {"most_bytes": file.limit.most_bytes}
    except OSError as error:
        raise DataError(f"{file.name}: the file cannot be read ({error}).") from error
    name = hashlib.sha256(os.fsencode(facts["path"])).hexdigest()[:24]
    target, record = folder / f"{name}.rows.jsonl", folder / f"{name}.rows.json"
    known = json_object_or_empty(record)
    if target.is_file() and known == facts | {"written": target.stat().st_size}:
        return target
    log.info("%s is written to a file of lines first, to be read in any order", file.name)
    names.mkdir(folder, parents=True, exist_ok=True)
    with durable.replacing(target) as out:
        os.fchmod(out.fileno(), 0o600)
        for line in _lines(file):
            out.write(line)
    if not _facts(file.path).items() <= facts.items():
        raise DataError(f"{file.name} changed while it was read; try again.")
    durable.write_json(record, facts | {"written": target.stat().st_size})
    return target


def _lines(file: RowFile) -> Iterator[bytes]:
    for item in file.values(is_row):
        at = item.position
        content = (
            [at.line, item.value]
            if isinstance(item, Located)
            else [at.line, at.column, item.fault, item.advice]
        )
        yield json.dumps(content, ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n"


def _facts(path: Path) -> dict[str, Any]:
    """What a file of lines must have been made of to be used."""
    status = path.stat()
    return {
        "path": str(path.resolve()),
        "size": status.st_size,
        "changed": status.st_mtime_ns,
        "node": status.st_ino,
        "code": _code(),
    }


@cache
def _code() -> str:
    """A digest of the code that reads sources."""
    digest = hashlib.sha256()
    for package in (sources, rows):
        for path in sorted(Path(package.__path__[0]).rglob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()
