"""Validators of names and patterns of modules, and of numbers of layers."""

import re
from collections.abc import Mapping
from typing import Any

from engine.config.choices import TARGET_PRESETS
from engine.config.spelling import comma_list
from engine.patterns import PatternError, pattern_of
from engine.storage import strict_json

_NAME = re.compile(r"[A-Za-z_][\w.]*")
_PATTERN = re.compile(r"[*+?()\[\]{}|^$\\]")
"""What tells a pattern from names that are misspelt."""


def target_names(value: Any) -> Any:
    """A preset or a pattern as it is, names of projections as a tuple."""
    if isinstance(value, str):
        if value in TARGET_PRESETS:
            return value
        if value in ("all-linear", "all_linear"):
            return "all"
    return _names_or_pattern(value, "all, attn, qv, a pattern, or at least one projection's name")


def excluded_names(value: Any) -> Any:
    """A pattern as it is, names of modules as a tuple, none as the empty one."""
    if value is None or value in ("", "none", (), []):
        return ()
    return _names_or_pattern(value, "a pattern, or at least one module's name")


def _names_or_pattern(value: Any, expected: str) -> Any:
    """Names with commas between them or in a list, which an ending matches; else a pattern."""
    if isinstance(value, str):
        names = comma_list(value)
        if not names:
            raise ValueError(f"should be {expected}")
        named = all(_NAME.fullmatch(name) for name in names)
        if not named and _PATTERN.search(value) and " " not in value:
            return checked_pattern(value)
        value = names
    if not isinstance(value, list | tuple) or not value:
        raise ValueError(f"should be {expected}")
    wrong = [name for name in value if not _NAME.fullmatch(str(name))]
    if wrong:
        raise ValueError(
            f"{wrong[0]!r} is no projection's name; a pattern is given alone, not in a list"
        )
    return tuple(dict.fromkeys(str(name) for name in value))


def checked_pattern(pattern: str) -> str:
    """A regular expression. Raises `ValueError` where it is none."""
    try:
        pattern_of(pattern)
    except PatternError as error:
        raise ValueError(f"{pattern[:80]!r} is neither names nor a pattern: {error}") from error
    return pattern


def start_name(value: Any) -> Any:
    """true, as PEFT has it for its default, and none as `default`; any case."""
    if value is None or value is True:
        return "default"
    text = value.strip().lower() if isinstance(value, str) else value
    return "default" if text in ("true", "kaiming") else text


def layer_ranges(value: Any) -> Any:
    """Numbers of layers, or a list of them, as `8-31,3`; none as None."""
    if value is None or value in ("", "none", (), []):
        return None
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if isinstance(value, list | tuple):
        return ",".join(str(item) for item in value)
    return value.replace(" ", "") if isinstance(value, str) else value


def number_by_pattern(value: Any) -> Any:
    """`q_proj=8,layers.3.mlp.*=4`, a JSON object or a mapping: a number by pattern of names."""
    if value is None:
        return {}
    if isinstance(value, str):
        value = _parsed(value.strip())
    if not isinstance(value, Mapping):
        raise ValueError("should be of the form PATTERN=NUMBER, or a mapping")
    for pattern in value:
        checked_pattern(str(pattern))
    return {str(pattern): number for pattern, number in value.items()}


def _parsed(text: str) -> dict[str, Any]:
    if text.startswith("{"):
        parsed = strict_json.loads(text)
        return parsed if isinstance(parsed, dict) else {}
    pairs = [part.rpartition("=") for part in text.split(",") if part.strip()]
    if any(not sign or not number.strip() for _, sign, number in pairs):
        raise ValueError(
            "should be of the form q_proj=8,o_proj=4; patterns with a comma or = in them are given "
            'as JSON: {"layers.(1|2).q_proj": 8}'
        )
    return {pattern.strip(): number.strip() for pattern, _, number in pairs}
