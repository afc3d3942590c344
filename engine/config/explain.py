"""Error messages for settings: name, source, and what was expected."""

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from engine.config.aliases import ALIASES
from engine.config.data_names.passwords import scrub


@dataclass(frozen=True)
class Setting:
    """One value as it was given, and where: `run.yaml:12`, `--learning-rate`, `preset full`."""

    value: Any
    source: str


def nearest(name: str, known: Mapping[str, Any]) -> str | None:
    """The known name (or the field of the known alias) that looks much like `name`.

    Below this likeness a suggestion misleads: `deepspeed` is no misspelt `seed`.
    """
    names = [*known, *(alias for alias, field in ALIASES.items() if field in known)]
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.75)
    return ALIASES.get(close[0], close[0]) if close else None


def describe(
    error: ValidationError, fields: Mapping[str, Any], settings: Mapping[str, Setting]
) -> str:
    """pydantic's findings as one paragraph: setting, value, source, what was expected."""
    findings = [_finding(fault, fields, settings) for fault in error.errors(include_url=False)]
    return scrub("The configuration cannot be used: " + "; ".join(dict.fromkeys(findings)) + ".")


def _finding(fault: Any, fields: Mapping[str, Any], settings: Mapping[str, Setting]) -> str:
    message = str(fault["msg"]).removeprefix("Value error, ")
    message = message[:1].lower() + message[1:]
    message = message.removeprefix("input ").partition(", unable to parse")[0]
    if not fault["loc"]:
        return message
    field = str(fault["loc"][0])
    if fault["type"] == "missing":
        what = getattr(fields.get(field), "description", None)
        flag = f"--{field.replace('_', '-')}"
        return (
            f"`{field}` is missing ({flag}: {what})" if what else f"`{field}` is missing ({flag})"
        )
    if fault["type"] == "extra_forbidden":
        near = nearest(field, fields)
        return f"there is no setting `{field}`" + (f"; did you mean `{near}`" if near else "")
    message = _expected(fault, fields.get(field)) or message
    given = settings.get(field)
    value = repr(given.value if given is not None else fault["input"])
    source = f" ({given.source})" if given is not None else ""
    return f"`{field}` = {value if len(value) <= 80 else value[:77] + '...'}{source}: {message}"


def _expected(fault: Any, field: Any) -> str | None:
    """What a setting takes, where pydantic shows a pattern, or leaves out that it may be unset."""
    if fault["type"] == "string_pattern_mismatch":
        shown = getattr(field, "json_schema_extra", None) or {}
        expected = shown.get("expected")
        return f"should be {expected}" if expected else None
    if fault["type"] == "literal_error":
        choices = [choice.strip("'") for choice in re.findall(r"'[^']*'", fault["msg"])]
        choices += ["none"] if getattr(field, "default", 0) is None else []
        return f"should be {', '.join(choices[:-1])} or {choices[-1]}" if choices[1:] else None
    return None
