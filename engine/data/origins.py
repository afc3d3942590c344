"""What a corpus was made of, and whether that has changed.

`rows.jsonl` has its `rows.jsonl.manifest.json`: the tool and its settings, size and SHA-256 of
every source and of the rows themselves, the number of rows and of those that were left out. A file
whose size and time are as they were is not read again.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.data.sources.resolve import RowFile
from engine.data.sources.spool import is_spooled
from engine.errors import CheckpointError, DataError
from engine.provenance import version
from engine.storage import durable
from engine.storage.safe_files import read_json_object

log = logging.getLogger(__name__)

SUFFIX = ".manifest.json"
FORMAT_VERSION = 1
_LARGEST = 64 * 2**20


@dataclass(frozen=True)
class Origin:
    """A source: a file, or the files of a folder that end in one of `suffixes`.

    `path` is None for what comes only once: a database, standard input, rows of a program.
    """

    name: str
    path: Path | None
    content: Path
    suffixes: tuple[str, ...] = ()

    @classmethod
    def of_file(cls, file: RowFile) -> Origin:
        """A file of rows."""
        return cls(file.name, None if is_spooled(file.path) else file.path, file.path)

    @classmethod
    def of_path(cls, path: Path, suffixes: tuple[str, ...] = ()) -> Origin:
        """A file, or a folder with all files in it that have one of the suffixes."""
        return cls(str(path), path, path, suffixes)

    def describe(self, folder: Path) -> dict[str, Any]:
        """What the manifest says of the source; its path starts from `folder`."""
        told: dict[str, Any] = {"name": self.name, **_digest(self.content, self.suffixes)}
        if self.path is not None:
            told["path"] = Path(os.path.relpath(self.path, folder)).as_posix()
        if self.suffixes:
            told["suffixes"] = list(self.suffixes)
        return told


def manifest_path(output: Path) -> Path:
    """The manifest of a corpus."""
    return output.with_name(output.name + SUFFIX)


def write_origins(
    output: Path,
    tool: str,
    settings: Mapping[str, Any],
    sources: Iterable[Origin],
    counts: Mapping[str, int],
    content: Path | None = None,
    manifest: Path | None = None,
) -> str:
    """Write the manifest of `output` and return its fingerprint.

    Args:
        output: the corpus.
        tool: which command made it.
        settings: what was asked for, as JSON values.
        sources: what it was made of.
        counts: rows written, and rows left out by their reasons.
        content: where the corpus stands until it gets its name; by default under its name.
        manifest: where to write it, if not beside `output`.

    Raises:
        CheckpointError: a file cannot be read or written.
    """
    told = [source.describe(output.parent) for source in sources]
    basis = [tool, dict(settings), [[source["name"], source["sha256"]] for source in told]]
    fingerprint = hashlib.sha256(json.dumps(basis, sort_keys=True).encode()).hexdigest()
    facts = {
        "format_version": FORMAT_VERSION,
        "engine_version": version(),
        "tool": tool,
        "settings": dict(settings),
        "fingerprint": fingerprint,
        "sources": told,
        "counts": dict(counts),
        "output": _digest(content or output),
    }
    durable.write_json(manifest or manifest_path(output), facts)
    return fingerprint


def stale(path: Path) -> list[str]:
    """What speaks against a corpus: a sentence for each change since it was made.

    Sources are followed to theirs. A file without a manifest, and a source that is no longer there,
    say nothing.
    """
    return list(dict.fromkeys(_stale(path, set())))


def notice_stale(files: Iterable[RowFile], strict: bool = False) -> None:
    """Warn of corpora that are stale. Raises `DataError` for one with `strict`."""
    changes = [change for file in files for change in stale(file.path)]
    if strict and changes:
        raise DataError(
            f"{' '.join(changes)} Make the corpus anew, or go without --strict to use it as it is."
        )
    for change in changes:
        log.warning("%s", change)


def _stale(path: Path, seen: set[Path]) -> Iterable[str]:
    manifest = manifest_path(path)
    if path in seen or not _is_there(manifest):
        return
    seen.add(path)
    try:
        told = read_json_object(manifest, limit=_LARGEST)
        tool, output, sources = told["tool"], told["output"], told["sources"]
        if _differs(path, output):
            yield f"{path} has changed since `engine data {tool}` wrote it."
        for source in sources:
            if "path" not in source:
                continue
            origin = Path(os.path.normpath(path.parent / source["path"]))
            if not origin.exists():
                continue
            if _differs(origin, source):
                yield (
                    f"{path} is stale: its source {origin} has changed since `engine data {tool}` "
                    "made it."
                )
            yield from _stale(origin, seen)
    except (OSError, ValueError, KeyError, TypeError, CheckpointError) as error:
        yield f"{manifest} cannot be read ({error!r}), so it is not known whether {path} is stale."


def _is_there(manifest: Path) -> bool:
    try:
        return manifest.is_file()
    except OSError:  # with its ending the name is too long, so nobody wrote one
        return False


def _differs(path: Path, told: Mapping[str, Any]) -> bool:
    if path.is_file():
        status = path.stat()
        if status.st_size != told["bytes"]:
            return True
        if status.st_mtime_ns == told["mtime_ns"]:
            return False
    return bool(_digest(path, tuple(told.get("suffixes", ())))["sha256"] != told["sha256"])


def _digest(path: Path, suffixes: tuple[str, ...] = ()) -> dict[str, Any]:
    """SHA-256, size and time of a file; of a folder, SHA-256 over its files' names and digests."""
    if path.is_file():
        status = path.stat()
        told = {"bytes": status.st_size, "mtime_ns": status.st_mtime_ns}
        return {**told, "sha256": durable.sha256_file(path)}
    whole = hashlib.sha256()
    files = files_below(path, suffixes)
    for file in files:
        name = file.relative_to(path).as_posix()
        whole.update(os.fsencode(f"{name}\0{durable.sha256_file(file)}\n"))
    return {"files": len(files), "sha256": whole.hexdigest()}


def files_below(folder: Path, suffixes: tuple[str, ...]) -> list[Path]:
    """The files of a folder that end in one of the suffixes, in order; hidden ones left out."""
    return [
        path
        for path in sorted(folder.rglob("*"))
        if path.is_file()
        and path.name.endswith(suffixes or ("",))
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    ]
