"""Read JSON strictly, with the position of every fault.

`json.loads` accepts NaN, Infinity and numbers that overflow to infinity, keeps the last of two
equal keys, and turns half a surrogate pair into a string that cannot be encoded again. Each of
these has corrupted data sets unseen, so each is an error here. The C reader does the work; only
when it, or a hook, objects does a slower scan in Python find the exact position.
"""

import json
import math
import re
from typing import Any

from engine.errors import CheckpointError, EngineError

MAX_DEPTH = 64
"""Objects and arrays nested deeper than this are refused (the reader itself is recursive)."""

MAX_DIGITS = 300
"""Longer integers are refused: no float holds them, and reading them takes quadratic time."""

# Possessive (`*+`): a long text without an end would otherwise take memory for every escape.
_TOKEN = re.compile(
    r'"[^"\\\x00-\x1f]*+(?:\\.[^"\\\x00-\x1f]*+)*+"|-?Infinity|NaN|-?\d[\d.eE+-]*+|true|false|null|[\[\]{}:,]|\s++'
)
_FAULTLESS = re.compile(
    r'(?:[\s,]++|-?\d{1,17}+(?:\.\d{1,17}+)?+(?![\d.eE+-])|true|false|null|"[^"\\\x00-\x1f\ud800-\udfff]*+")++'
)
"""Values in a list that strict JSON forbids nothing about."""
_LONGEST_WORD = 16
"""Characters within which a text that is cut off ends in a broken word, number or escape."""
_SURROGATE = re.compile(r"[\ud800-\udfff]")
_SURROGATE_ESCAPE = re.compile(r"\\u[dD][89a-fA-F]")


class JSONFault(ValueError):
    """What is wrong with a JSON text, and where.

    Attributes:
        message: what was found.
        position: index of the offending character in the text that was read.
    """

    def __init__(self, message: str, position: int) -> None:
        super().__init__(message)
        self.message = message
        self.position = position


class _Objection(Exception):
    """A hook refuses a value; hooks do not know the position, the scan finds it."""


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise _Objection
    return result


def _no_constant(_name: str) -> float:
    raise _Objection


def _finite_float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise _Objection
    return value


def _short_int(text: str) -> int:
    if len(text) > MAX_DIGITS:
        raise _Objection
    return int(text)


_DECODER = json.JSONDecoder(
    object_pairs_hook=_unique_keys,
    parse_constant=_no_constant,
    parse_float=_finite_float,
    parse_int=_short_int,
)


def decode(text: str, start: int = 0) -> tuple[Any, int]:
    """Read the JSON value that begins at text[start] (no white space before it).

    Returns:
        the value, and the index of the first character after it.

    Raises:
        JSONFault: the text is not strict JSON.
    """
    try:
        return _decode(text, start)
    except json.JSONDecodeError as error:
        raise _find_fault(text, start, error) from None


def begin(text: str, start: int) -> tuple[Any, int] | None:
    """`decode` for a text that goes on: None where what is wrong may be that it is cut off."""
    try:
        return _decode(text, start)
    except json.JSONDecodeError as error:
        if error.msg.startswith("Unterminated") or error.pos >= len(text) - _LONGEST_WORD:
            return None
        raise _find_fault(text, start, error) from None


def _decode(text: str, start: int) -> tuple[Any, int]:
    """`decode` that raises the reader's own error for what is no JSON at all."""
    try:
        value, end = _DECODER.raw_decode(text, start)
    except json.JSONDecodeError:
        raise
    except (_Objection, ValueError, RecursionError) as error:
        raise _find_fault(text, start, error) from None
    if _too_deep(value) or _SURROGATE_ESCAPE.search(text, start, end):
        fault = _scan(text, start, end)
        if fault is not None:
            raise fault
    return value, end


def loads(text: str) -> Any:
    """Read a text that is exactly one JSON value with optional white space around it.

    Raises:
        JSONFault: the text is not strict JSON, or something follows the value.
    """
    start = len(text) - len(text.lstrip(" \t\r\n"))
    value, end = decode(text, start)
    rest = text[end:].lstrip(" \t\r\n")
    if rest:
        raise JSONFault("something follows the end of the JSON value", len(text) - len(rest))
    return value


def parse_object(
    text: str | bytes, source: str, error: type[EngineError] = CheckpointError
) -> dict[str, Any]:
    """Read `text`, which must be exactly one JSON object, in UTF-8 if it is bytes.

    Whatever is wrong with it raises `error`, which names `source`, line and column.
    """
    try:
        decoded = text if isinstance(text, str) else text.decode()
        value = loads(decoded)
    except UnicodeDecodeError as problem:
        raise error(
            f"{source} is not UTF-8 text (byte {problem.start}: {problem.reason}); copy it again."
        ) from problem
    except JSONFault as fault:
        line = decoded.count("\n", 0, fault.position) + 1
        column = fault.position - decoded.rfind("\n", 0, fault.position)
        raise error(
            f"{source}:{line}:{column}: this is not acceptable JSON: {fault.message}; expected one "
            "JSON object. The file is damaged or cut short; copy it again."
        ) from fault
    if not isinstance(value, dict):
        raise error(f"{source} holds a JSON {type(value).__name__}; expected an object.")
    return value


def _too_deep(value: Any) -> bool:
    """Whether objects and arrays are nested deeper than `MAX_DEPTH`."""
    level = [value] if isinstance(value, dict | list) else []
    for _ in range(MAX_DEPTH):
        level = [
            inner
            for outer in level
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, dict | list)
        ]
        if not level:
            return False
    return True


def _find_fault(text: str, start: int, error: Exception) -> JSONFault:
    """Locate a fault that the fast reader noticed without a position, or with one."""
    end = error.pos if isinstance(error, json.JSONDecodeError) else len(text)
    fault = _scan(text, start, end)
    if fault is not None and fault.position < end:
        return fault
    if isinstance(error, json.JSONDecodeError):
        message = error.msg.removesuffix(" at").removesuffix(" starting")
        return JSONFault(message[:1].lower() + message[1:], error.pos)
    return JSONFault(f"the value cannot be read ({error})", start)


def _scan(text: str, start: int, end: int) -> JSONFault | None:
    """Walk over the tokens of text[start:end] and return the first that is forbidden, or None.

    Syntax errors are not looked for: at the first character that starts no token the scan ends,
    and the reader's own message stands.
    """
    keys: list[set[str] | None] = []
    position, expect_key = start, False
    while match := _TOKEN.match(text, position, end):
        token, position = match.group(), match.end()
        if token.isspace():
            continue
        if token in "{[":
            keys.append(set() if token == "{" else None)
            if len(keys) > MAX_DEPTH:
                return JSONFault(f"values nested more than {MAX_DEPTH} deep", match.start())
            expect_key = token == "{"
            position = _after_faultless(text, position, end, keys)
            continue
        if token in "]}":
            if keys:
                keys.pop()
            if not keys:
                return None
            position = _after_faultless(text, position, end, keys)
            continue
        if token == ",":
            expect_key = bool(keys) and keys[-1] is not None
            continue
        fault = _value_fault(token, keys[-1] if keys and expect_key else None)
        if fault is not None:
            return JSONFault(fault, match.start())
        if token != ":":
            expect_key = False
        if not keys:
            return None
    return None


def _after_faultless(text: str, position: int, end: int, keys: list[set[str] | None]) -> int:
    """Where the next value of a list stands that has to be looked at."""
    match = _FAULTLESS.match(text, position, end) if keys[-1] is None else None
    return position if match is None else match.end()


def _value_fault(token: str, seen: set[str] | None) -> str | None:
    """What strict JSON forbids about one scalar token; `seen` holds the object's keys so far."""
    if token[0] == '"':
        return _string_fault(token, seen)
    if token in ("NaN", "Infinity", "-Infinity"):
        return f"{token} is not a JSON number"
    if token[0] in "-0123456789":
        return _number_fault(token)
    return None


def _string_fault(token: str, seen: set[str] | None) -> str | None:
    try:
        text = str(json.loads(token)) if "\\" in token else token[1:-1]
    except json.JSONDecodeError:
        return None
    if _SURROGATE.search(text):
        return "half of a surrogate pair (\\ud800 to \\udfff alone), which is not text"
    if seen is not None:
        if text in seen:
            return f"the key {text[:80]!r} stands in one object twice, here the second time"
        seen.add(text)
    return None


def _number_fault(token: str) -> str | None:
    if token.lstrip("-").isdigit():
        return f"an integer of {len(token)} digits" if len(token) > MAX_DIGITS else None
    try:
        finite = math.isfinite(float(token))
    except ValueError:
        return None
    return None if finite else "a number too large to be finite"
