"""Checkers: whether an answer is what it has to be."""

from __future__ import annotations

import ast
import re
import subprocess
import warnings
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from engine.config.tasks.gates import GateSettings
from engine.errors import ConfigError
from engine.patterns import Pattern, PatternError, may_backtrack
from engine.storage import strict_json
from engine.storage.safe_files import read_json_object

Checker = Callable[[str], str | None]
"""Takes an answer; None where it is accepted, else what is wrong with it."""

_FENCE = re.compile(
    r"^[ \t]*(```+|~~~+)[ \t]*([\w+#.-]*)[^\n]*\n(.*?)(?:^[ \t]*\1[`~]*[ \t]*$|\Z)",
    re.MULTILINE | re.DOTALL,
)
_LONGEST = 1 << 20
"""Characters of the longest answer that is parsed; Python's parser needs about 100 bytes each."""


def fenced(answer: str, languages: tuple[str, ...]) -> str:
    """The code of an answer: its fenced blocks in one of `languages`, else the whole text.

    Blocks without a language count where none has one of these.
    """
    blocks = [(match[2].lower(), match[3]) for match in _FENCE.finditer(answer)]
    named = [text for language, text in blocks if language in languages]
    chosen = named or [text for language, text in blocks if not language]
    return "\n".join(chosen) if chosen else answer


def python_source(answer: str) -> str:
    """The Python code of an answer."""
    return fenced(answer, ("python", "py", "python3"))


def make_checker(settings: GateSettings) -> Checker | None:
    """The checker that `settings` name, or None.

    Raises `ConfigError` where what it needs is missing: a pattern, a schema, a program.
    """
    makers: dict[str, Callable[[GateSettings], Checker]] = {
        "python-ast": lambda _: check_python,
        "json": lambda _: check_json,
        "json-schema": _schema_checker,
        "regex": _pattern_checker,
        "command": _command_checker,
    }
    return None if settings.checker is None else makers[settings.checker](settings)


def check_python(answer: str) -> str | None:
    """Accepts Python source with at least one statement, in a fence or bare."""
    source = python_source(answer)
    if len(source) > _LONGEST:
        return f"{len(source)} characters, which is no answer"
    try:
        with warnings.catch_warnings(action="ignore"):
            tree = ast.parse(source)
    except (SyntaxError, ValueError, MemoryError, RecursionError) as error:
        return f"no Python: {error}"
    return None if tree.body else "no Python: there is no statement"


def check_json(answer: str) -> str | None:
    """Accepts one JSON value, in a fence or bare."""
    fault, _ = _json_value(answer)
    return fault


def _json_value(answer: str) -> tuple[str | None, Any]:
    try:
        return None, strict_json.loads(fenced(answer, ("json",)))
    except strict_json.JSONFault as fault:
        return f"no JSON: {fault.message}", None
    except RecursionError:
        return "no JSON: it is nested too deeply", None


def _schema_checker(settings: GateSettings) -> Checker:
    if settings.schema_file is None:
        raise ConfigError(
            "The checker json-schema needs `schema_file`, a file with a JSON schema; add it to "
            "the gates file."
        )
    if find_spec("jsonschema") is None:
        raise ConfigError(
            "The checker json-schema needs the package jsonschema: pip install "
            "'engine-trainer[gates]'."
        )
    import jsonschema

    schema = _read_schema(settings.schema_file)
    kind = jsonschema.validators.validator_for(schema)
    try:
        kind.check_schema(schema)
    except jsonschema.SchemaError as error:
        raise ConfigError(
            f"{settings.schema_file}: it is no valid JSON schema: {error.message}."
        ) from None
    _refuse_slow_keys(schema, settings.schema_file)
    validator = _bounded(kind)(schema)

    def check(answer: str) -> str | None:
        fault, value = _json_value(answer)
        if fault is not None:
            return fault
        error = jsonschema.exceptions.best_match(validator.iter_errors(value))
        return None if error is None else f"{error.json_path}: {error.message}"

    return check


@cache
def _bounded(kind: Any) -> Any:
    """A validator's class with `pattern` matched in bounded time, also in its subschemas.

    A subschema that names a `$schema` of its own is checked by the bounded class of that one.
    """
    import attrs
    import jsonschema

    bounded = jsonschema.validators.extend(kind, {"pattern": _schema_pattern})

    def evolve(own: Any, **changes: Any) -> Any:
        schema = changes.get("schema", own.schema)
        other = jsonschema.validators.validator_for(schema, default=kind)
        fields = [field for field in attrs.fields(type(own)) if field.init]
        values = {field.alias: getattr(own, field.name) for field in fields}
        return _bounded(other)(**values | changes)

    bounded.evolve = evolve
    return bounded


def _schema_pattern(
    validator: Any, text: str, instance: Any, schema: Mapping[str, Any]
) -> Iterator[Exception]:
    """The keyword `pattern`, matched in bounded time."""
    import jsonschema

    if not validator.is_type(instance, "string"):
        return
    try:
        matches = Pattern(text, each=True).search(instance) is not None
    except PatternError as error:
        raise ConfigError(f"The JSON schema's pattern {text[:80]!r} is none: {error}.") from None
    if not matches:
        yield jsonschema.ValidationError(f"{instance[:200]!r} does not match {text[:80]!r}")


def _refuse_slow_keys(schema: Any, path: Path) -> None:
    """Raise `ConfigError` for patterns of keys that may take for ever; they are matched as is."""
    inner = schema.values() if isinstance(schema, dict) else schema
    if isinstance(schema, dict) and isinstance(schema.get("patternProperties"), dict):
        slow = [key for key in schema["patternProperties"] if may_backtrack(key)]
        if slow:
            raise ConfigError(
                f"{path}: the pattern of keys {slow[0][:80]!r} has repetitions inside repetitions, "
                "or many of them, which can take for ever; write it without."
            )
    if isinstance(schema, dict | list):
        for value in inner:
            _refuse_slow_keys(value, path)


def _read_schema(path: Path) -> dict[str, Any]:
    try:
        return read_json_object(path, ConfigError)
    except ConfigError as error:
        raise ConfigError(f"The JSON schema cannot be read. {error}") from None


def _pattern_checker(settings: GateSettings) -> Checker:
    if settings.pattern is None:
        raise ConfigError(
            "The checker regex needs `pattern`, a regular expression that is searched in the "
            "answer; add it to the gates file."
        )
    try:
        pattern = Pattern(settings.pattern, re.DOTALL, each=True)
    except PatternError as error:
        raise ConfigError(
            f"`pattern` = {settings.pattern!r} is no regular expression: {error}."
        ) from None

    def check(answer: str) -> str | None:
        return f"nothing matches {pattern.text!r}" if pattern.search(answer) is None else None

    return check


def _command_checker(settings: GateSettings) -> Checker:
    if not settings.command:
        raise ConfigError(
            "The checker command needs `command`, a list of a program and its arguments, which "
            "reads the answer from its standard input and ends with status 0 if it is right."
        )

    def check(answer: str) -> str | None:
        try:
            done = subprocess.run(
                settings.command,
                input=answer.encode("utf-8", "replace"),
                capture_output=True,
                timeout=settings.command_seconds,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return f"{settings.command[0]} did not end in {settings.command_seconds:g} s"
        except OSError as error:
            raise ConfigError(
                f"`command` = {list(settings.command)} cannot be run: {error}. Name a program "
                "that is installed."
            ) from None
        if done.returncode == 0:
            return None
        said = (done.stderr or done.stdout).decode("utf-8", "replace").strip()
        return f"status {done.returncode}: {said[-300:]}" if said else f"status {done.returncode}"

    return check
