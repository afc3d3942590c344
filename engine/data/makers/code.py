"""Rows from Python sources: documented functions and classes, by their syntax trees.

Sources are parsed and never imported, so nothing of them runs.
"""

from __future__ import annotations

import ast
import re
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from engine.data.corpus.records import Record, new_record
from engine.data.origins import files_below
from engine.errors import DataError
from engine.storage.home import expanded

SHORTEST = 20
"""Characters of a docstring that says something."""

_Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


@dataclass(frozen=True)
class ExtractLimits:
    """Whose code becomes an answer, by its lines, and whether private names are taken."""

    fewest_lines: int = 3
    most_lines: int = 80
    private: bool = False


def source_path(name: str) -> Path:
    """A file or folder of that name, or the files of an installed package.

    Raises `DataError` where there is neither.
    """
    path = expanded(name)
    if path.exists():
        return path
    spec = find_spec(name) if name.isidentifier() else None
    if spec is not None and spec.submodule_search_locations:
        return Path(next(iter(spec.submodule_search_locations)))
    if spec is not None and spec.origin is not None and spec.origin.endswith(".py"):
        return Path(spec.origin)
    raise DataError(
        f"{name}: there is no such file or folder, and no installed package of this name with "
        "Python sources. Check the path."
    )


def source_files(path: Path, suffixes: tuple[str, ...]) -> list[Path]:
    """The files of a folder that end in one of the suffixes, in order, or the file itself."""
    return [path] if path.is_file() else files_below(path, suffixes)


def code_rows(file: Path, task: str, limits: ExtractLimits, counts: Counter[str]) -> list[Record]:
    """Rows of a file.

    Args:
        file: of Python.
        task: `write` (the code of what is described), `describe` (the docstring of what is named),
            or `both`.
        limits: which definitions.
        counts: takes what is left out, by the reason.

    Raises:
        ValueError, SyntaxError: the file cannot be parsed.
    """
    source = file.read_bytes()
    with warnings.catch_warnings(action="ignore"):
        tree = ast.parse(source)
    lines = re.split("\r\n|\r|\n", source.decode("utf-8-sig"))
    rows = []
    for node, name in _definitions(tree):
        text = ast.get_docstring(node) or ""
        reason = _unfit(name, text, limits)
        if reason is not None:
            counts[reason] += 1
            continue
        length = (node.end_lineno or node.lineno) - node.lineno + 1
        where, code = f"{file}:{node.lineno}", _code(node, lines)
        documented = Definition("Python", _kind(node, name), name, text, code, length, where)
        rows += definition_rows(documented, task, limits, counts)
    return rows


@dataclass(frozen=True)
class Definition:
    """A documented definition of a program: `text` is what is said of it, `length` its lines.

    `source` tells the file and the line.
    """

    language: str
    kind: str
    name: str
    text: str
    code: str
    length: int
    source: str


def definition_rows(
    given: Definition, task: str, limits: ExtractLimits, counts: Counter[str]
) -> list[Record]:
    """The rows of a definition that the task asks for; arguments as of `code_rows`."""
    about = {"category": given.kind, "rating": 5, "source": given.source}
    words = f"the {given.language} {given.kind} `{given.name}`"
    unfit = _unfit_length(given.length, limits)
    rows = []
    if task != "describe" and unfit is not None:
        counts[unfit] += 1
    elif task != "describe":
        rows.append(new_record(f"Write {words}.\n\n{given.text}", given.code, **about))
    if task != "write":
        does = given.kind in ("function", "method")
        prompt = f"What does {words} do?" if does else f"What is {words}?"
        rows.append(new_record(prompt, given.text, **about))
    return rows


def _definitions(tree: ast.Module) -> Iterator[tuple[_Definition, str]]:
    for node in tree.body:
        if isinstance(node, _Definition):
            yield node, node.name
        if isinstance(node, ast.ClassDef):
            for member in node.body:
                if isinstance(member, ast.FunctionDef | ast.AsyncFunctionDef):
                    yield member, f"{node.name}.{member.name}"


def _unfit(name: str, text: str, limits: ExtractLimits) -> str | None:
    """Why a definition becomes no row; None if it does."""
    if not limits.private and any(part.startswith("_") for part in name.split(".")):
        return "private"
    return "without_a_docstring" if len(text) < SHORTEST else None


def _unfit_length(count: int, limits: ExtractLimits) -> str | None:
    """Whether so many lines of code are too few or too many for an answer; None if neither."""
    if count < limits.fewest_lines:
        return "too_short"
    return "too_long" if count > limits.most_lines else None


def _kind(node: _Definition, name: str) -> str:
    if isinstance(node, ast.ClassDef):
        return "class"
    return "method" if "." in name else "function"


def _code(node: _Definition, lines: list[str]) -> str:
    start = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
    chosen = lines[start - 1 : node.end_lineno]
    indent = chosen[0][: len(chosen[0]) - len(chosen[0].lstrip())]
    return "\n".join(line.removeprefix(indent) for line in chosen).rstrip()
