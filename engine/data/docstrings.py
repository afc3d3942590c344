"""Prompt/response rows from the standard library's docstrings.

A data set that every machine already has: "What does the Python function `textwrap.fill` do?",
answered by its docstring. Sources are parsed, not imported, so nothing runs; only modules written
in C, which have no source, are imported, and only such as do nothing on import. Names and
docstrings are all that is taken: a signature's default values would carry this machine's paths and
environment into the data. The same Python gives the same rows in the same order.
"""

import ast
import hashlib
import importlib
import inspect
import json
import sys
import sysconfig
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from engine.data.origins import manifest_path
from engine.data.rows import Row
from engine.errors import DataError
from engine.storage import durable, names

SHORTEST, LONGEST = 60, 1200
"""Characters of a docstring that becomes a row."""

SCHEMA_VERSION = "docstrings-1"

# Not worth asking about, or (tkinter, turtle) about something that may not be installed.
_SKIPPED = {
    "antigravity", "distutils", "ensurepip", "idlelib", "lib2to3", "nt", "pydoc_data", "readline",
    "site", "test", "this", "tkinter", "turtle", "turtledemo", "venv",
}  # fmt: skip
# Modules in Python whose public names are partly written in C; importing them does nothing else.
_PARTLY_C = {
    "collections", "datetime", "decimal", "functools", "hashlib", "heapq", "io", "operator",
    "pickle", "random", "re", "socket", "sqlite3", "ssl", "struct", "threading", "weakref",
}  # fmt: skip
_SHINGLE = 6
_MOST_SHARED = 0.3


@dataclass(frozen=True)
class _Entry:
    """One documented name: `kind` is function, class or method."""

    name: str
    kind: str
    text: str
    file: str
    line: int


def docstring_pairs(limit: int | None = None) -> list[Row]:
    """Rows from the standard library, mixed by a fixed order.

    Args:
        limit: most rows; all by default.

    Raises:
        DataError: the installation has no readable standard library.
    """
    chosen = _chosen()
    if not chosen:
        raise DataError(
            f"{_library()}: no docstrings were found; this Python comes without the sources of "
            "its standard library, or runs with -OO. Use another Python, or other data."
        )
    return [_row(entry) for entry in chosen[:limit]]


@cache
def _chosen() -> tuple[_Entry, ...]:
    """The documented names that become rows, in their order."""
    chosen: dict[str, _Entry] = {}
    for entry in sorted(_entries(), key=lambda entry: (entry.name.count("."), entry.name)):
        if SHORTEST <= len(entry.text) <= LONGEST:
            # The same text under two names, or two texts that begin alike, teach the same thing.
            chosen.setdefault(" ".join(entry.text.casefold().split())[:100], entry)
    return tuple(sorted(chosen.values(), key=lambda entry: _hash(entry.name)))


def split_by_module(rows: Sequence[Row], fraction: float = 0.15) -> tuple[list[Row], list[Row]]:
    """Split rows so that no module stands on both sides.

    A module is held out when the hash of its name falls below `fraction`. Held-out rows that
    repeat much of a training row's wording (`os` and `posix` describe the same calls) are left
    out altogether.

    Returns:
        training rows and held-out rows.
    """
    sides: tuple[list[Row], list[Row]] = ([], [])
    for row in rows:
        module = _name_of(row).split(".")[0]
        sides[_hash(module) < fraction * 2**64].append(row)
    train, heldout = sides
    known = {shingle for row in train for shingle in _shingles(row)}
    return train, [row for row in heldout if _shared(row, known) <= _MOST_SHARED]


def write_docstrings(
    output_dir: Path,
    limit: int | None = None,
    fraction: float = 0.15,
    describe: Callable[[Path, int], None] | None = None,
) -> tuple[Path, int, Path, int]:
    """Write train.jsonl and heldout.jsonl.

    Args:
        output_dir: made if it does not exist.
        limit: most rows of both files together.
        fraction: share of modules to hold out.
        describe: called with each file and its rows before the two get their names.

    Returns:
        each file with the number of its rows.

    Raises:
        DataError: there are no rows, or the folder cannot be made.
        CheckpointError: a file cannot be written.
    """
    train, heldout = split_by_module(docstring_pairs(limit), fraction)
    files = output_dir / "train.jsonl", output_dir / "heldout.jsonl"
    try:
        names.mkdir(output_dir, parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(
            f"{output_dir}: the folder cannot be made ({error.strerror or error}). Choose one on "
            "a disk with space that you may write to."
        ) from error
    replaces = any(path.exists() for file in files for path in (file, manifest_path(file)))
    with durable.publish_files(files[0], replaces) as folder:
        for file, rows in zip(files, (train, heldout), strict=True):
            durable.write_text(folder / file.name, "".join(_line(row) for row in rows))
            if describe is not None:
                describe(folder / file.name, len(rows))
    return files[0], len(train), files[1], len(heldout)


def _row(entry: _Entry) -> Row:
    question = f"What does the Python {entry.kind} `{entry.name}` do?"
    return Row(
        messages=[
            {"role": "user", "content": question},
            {"role": "assistant", "content": entry.text},
        ],
        line=entry.line,
        file=entry.file,
        category=entry.kind,
        rating=5,
        schema_version=SCHEMA_VERSION,
    )


def _line(row: Row) -> str:
    record = {
        "prompt": row.messages[0]["content"],
        "response": row.messages[1]["content"],
        "category": row.category,
        "rating": row.rating,
        "source": row.source,
        "schema_version": row.schema_version,
    }
    return json.dumps(record, ensure_ascii=False) + "\n"


def _name_of(row: Row) -> str:
    return str(row.messages[0]["content"]).split("`")[1]


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def _shingles(row: Row) -> set[tuple[str, ...]]:
    words = str(row.messages[1]["content"]).casefold().split()
    return {tuple(words[i : i + _SHINGLE]) for i in range(max(1, len(words) - _SHINGLE + 1))}


def _shared(row: Row, known: set[tuple[str, ...]]) -> float:
    own = _shingles(row)
    return len(own & known) / len(own)


def _library() -> Path:
    return Path(sysconfig.get_path("stdlib"))


def _entries() -> Iterator[_Entry]:
    names = sorted(
        name for name in sys.stdlib_module_names if name[0] != "_" and name not in _SKIPPED
    )
    for name in names:
        sources = _sources(name)
        for module, path in sources:
            yield from _parsed(module, path)
        if not sources or name in _PARTLY_C:
            yield from _imported(name)


def _sources(name: str) -> list[tuple[str, Path]]:
    """The Python files of a module or package with their dotted names, private ones left out."""
    library = _library()
    if (library / f"{name}.py").is_file():
        return [(name, library / f"{name}.py")]
    modules = []
    for path in sorted((library / name).rglob("*.py")):
        parts = path.relative_to(library).with_suffix("").parts
        if parts[-1] == "__init__":
            parts = parts[:-1]
        if not any(part.startswith(("_", "test")) for part in parts):
            modules.append((".".join(parts), path))
    return modules


def _parsed(module: str, path: Path) -> Iterator[_Entry]:
    try:
        with warnings.catch_warnings(action="ignore"):
            tree = ast.parse(path.read_bytes())
    except (OSError, SyntaxError, ValueError):
        return  # A file that this Python cannot parse is no part of its library.
    file = path.relative_to(_library()).as_posix()
    for node in tree.body:
        yield from _documented(node, module, file, "function")
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            for member in node.body:
                yield from _documented(member, f"{module}.{node.name}", file, "method")


def _documented(node: ast.stmt, parent: str, file: str, kind: str) -> Iterator[_Entry]:
    if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return
    text = ast.get_docstring(node)
    if text and not node.name.startswith("_"):
        kind = "class" if isinstance(node, ast.ClassDef) else kind
        yield _Entry(f"{parent}.{node.name}", kind, text.strip(), file, node.lineno)


def _imported(name: str) -> Iterator[_Entry]:
    """The names of a module that are written in C."""
    try:
        with warnings.catch_warnings(action="ignore"):
            module = importlib.import_module(name)
    except ImportError:
        return  # Listed for every platform, built only for some.
    for attribute, value in sorted(vars(module).items()):
        # Hooks are there to be replaced, and what replaced them is not the library's.
        is_public = not attribute.startswith("_") and not attribute.endswith("hook")
        if is_public and _is_in_c(value, module):
            text = inspect.cleandoc(value.__doc__ or "").strip()
            kind = "class" if isinstance(value, type) else "function"
            yield _Entry(f"{name}.{attribute}", kind, text, name, 1)


def _is_in_c(value: Any, module: ModuleType) -> bool:
    if isinstance(value, type):
        # Classes made in Python can be changed; those made in C cannot.
        is_static = not value.__flags__ & (1 << 9)
        home = getattr(value, "__module__", "").lstrip("_").split(".")[0]
        return is_static and home in (module.__name__, "builtins", "io")
    return inspect.isbuiltin(value)
