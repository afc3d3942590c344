"""The rows whose answers are judged, and what is right."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.data.rows import CHAT_KEYS, RESPONSE_KEYS, Row, is_row, parse_row
from engine.data.rows.fields import RowFault, json_name
from engine.data.sources.file_kinds import DATA_SUFFIXES, plain_suffix
from engine.data.sources.resolve import RowFile, data_files
from engine.data.sources.streams.located import BadLine
from engine.errors import DataError
from engine.patterns import Pattern, PatternError

_REFERENCES = (*RESPONSE_KEYS, *CHAT_KEYS, "solution")
_TESTS = ("tests", "test", "test_list")
_NONE = "(none)"


@dataclass(frozen=True)
class Question:
    """One row to be answered.

    Attributes:
        messages: the conversation up to the answer.
        reference: the row's own answer, or None.
        tests: Python source that is run behind the answer's code, or None.
        prefix: Python source before the answer's code, for rows whose prompt is code to complete.
        expected: texts, one of which the answer has to equal but for space around it.
        contains: texts that the answer has to hold, all of them.
        pattern: a regular expression that has to match somewhere in the answer, or None.
        row: the row, for its category, tools and position.
    """

    messages: list[dict[str, Any]]
    reference: str | None
    row: Row
    tests: str | None = None
    prefix: str = ""
    expected: tuple[str, ...] = ()
    contains: tuple[str, ...] = ()
    pattern: Pattern | None = None

    @property
    def is_checked(self) -> bool:
        """Whether the row itself says what a right answer is."""
        return bool(self.tests or self.expected or self.contains or self.pattern)


def read_questions(paths: Sequence[str], most: int) -> list[Question]:
    """The first `most` rows of files and folders; of a folder every data file is read, by name.

    A row is one of training data, or has no answer but `tests` (with `entry_point`, as HumanEval's
    rows), `expected`, `contains` or `pattern`.

    Raises `DataError` for a file that cannot be read and for a row without a prompt.
    """
    questions: list[Question] = []
    for file in _files(paths):
        for item in file.values(lambda raw: is_row(raw) or "prompt" in raw):
            if isinstance(item, BadLine):
                raise DataError(str(item))
            if len(questions) == most:
                return questions
            try:
                questions.append(make_question(item.value, item.position.file, item.position.line))
            except RowFault as fault:
                where = f"{item.position.file}:{item.position.line}"
                raise DataError(f"{where}: found {fault}. Change the row, or remove it.") from None
    if not questions:
        raise DataError(f"{', '.join(paths)}: there is no row to answer; expected at least one.")
    return questions


def _files(paths: Sequence[str]) -> list[RowFile]:
    files: list[RowFile] = []
    for path in map(Path, paths):
        if path.is_dir():
            here = sorted(p for p in path.iterdir() if plain_suffix(p) in DATA_SUFFIXES)
            files += [RowFile(p, str(p)) for p in here]
        else:
            files += data_files(path)
    if not files:
        raise DataError(f"{', '.join(map(str, paths))}: the folder holds no data file.")
    return files


def make_question(raw: Any, file: str, line: int) -> Question:
    """The question that one JSON value asks. Raises `RowFault`."""
    if not isinstance(raw, dict):
        raise RowFault(f"{json_name(raw)} where an object was expected")
    solution = raw.get("canonical_solution")
    has_reference = bool(solution) or any(raw.get(key) for key in _REFERENCES)
    if not any(raw.get(key) for key in _REFERENCES):
        raw = {**raw, "response": solution or _NONE}
    row = parse_row(raw, file, line)
    messages = list(row.messages)
    reference = None
    while messages and messages[-1]["role"] != "user":
        last = messages.pop()
        if last["role"] == "assistant" and has_reference:
            reference = str(last.get("content") or "")
    if not messages:
        raise RowFault("a row without a user's message, which is what is to be answered")
    tests = next((text for key in _TESTS if (text := _text(raw, key))), None)
    entry = _text(raw, "entry_point")
    if tests and entry:
        tests = f"{tests}\n\ncheck({entry})\n"
    return Question(
        messages,
        reference,
        row,
        tests=tests,
        prefix=str(raw.get("prompt", "")) if entry else "",
        expected=_texts(raw, "expected"),
        contains=_texts(raw, "contains"),
        pattern=_pattern(raw),
    )


def _text(raw: Mapping[str, Any], key: str) -> str | None:
    value = raw.get(key)
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        value = "\n".join(value)  # MBPP's `test_list` form: assertions, one a line.
    if value is not None and not isinstance(value, str):
        raise RowFault(f"'{key}' is {json_name(value)} where text was expected")
    return value or None


def _texts(raw: Mapping[str, Any], key: str) -> tuple[str, ...]:
    value = raw.get(key)
    listed = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(item, str | int | float) for item in listed):
        raise RowFault(f"'{key}' is {json_name(value)} where text, or a list of texts was expected")
    return tuple(str(item) for item in listed)


def _pattern(raw: Mapping[str, Any]) -> Pattern | None:
    text = _text(raw, "pattern")
    try:
        return None if text is None else Pattern(text, re.DOTALL, each=True)
    except PatternError as error:
        raise RowFault(f"'pattern' is {text!r}, which is no regular expression: {error}") from None
