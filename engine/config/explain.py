"""Error messages for settings: name, source, and what was expected."""

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from engine.config.aliases import ALIASES
from engine.config.data_names.passwords import scrub
from engine.errors import printable


@dataclass(frozen=True)
class Setting:
    """One value as it was given, and where: `run.yaml:12`, `--learning-rate`, `preset full`."""

    value: Any
    source: str


_LONGEST_MESSAGE = 1000
_MOST = 20

# What a single letter means in other programs, the most usual first; no setting here has one.
_LETTERS: dict[str, tuple[str, ...]] = {
    "a": ("adapter", "accumulate"),
    "b": ("batch_size",),
    "d": ("data",),
    "e": ("epochs",),
    "m": ("model",),
    "n": ("max_new_tokens", "max_steps"),
    "o": ("output_dir", "output"),
    "p": ("prompt", "port"),
    "r": ("lora_rank",),
    "s": ("seed",),
    "t": ("temperature",),
}


def nearest(name: str, known: Mapping[str, Any]) -> str | None:
    """The known name (or the field of the known alias) that `name` is misspelt or short for.

    Below this likeness a suggestion misleads: `deepspeed` is no misspelt `seed`.
    """
    names = [*known, *(alias for alias, field in ALIASES.items() if field in known)]
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.75)
    if not close:
        return _written_out(name, known)
    # Of one table `output` is a setting, of another the alias of `output_dir`.
    return close[0] if close[0] in known else ALIASES[close[0]]


def _written_out(short: str, known: Mapping[str, Any]) -> str | None:
    """The one name that `short` abbreviates: `m`, `batch` or `bs` for model or batch_size."""
    names = [name for name in _LETTERS.get(short, ()) if name in known][:1]
    if len(short) == 1:
        names = names or [name for name in known if name.startswith(short)]
    else:
        names = [name for name in known if name.rpartition("_")[0] == short]
        names = names or [n for n in known if "".join(word[0] for word in n.split("_")) == short]
    return names[0] if len(names) == 1 else None


def describe(
    error: ValidationError, fields: Mapping[str, Any], settings: Mapping[str, Setting]
) -> str:
    """pydantic's findings as one paragraph: setting, value, source, what was expected."""
    faults = error.errors(include_url=False)
    findings = list(dict.fromkeys(_finding(fault, fields, settings) for fault in faults[:_MOST]))
    if len(faults) > _MOST:
        findings.append(f"and {len(faults) - _MOST} more")
    return scrub("The configuration cannot be used: " + "; ".join(findings) + ".")


def _finding(fault: Any, fields: Mapping[str, Any], settings: Mapping[str, Setting]) -> str:
    message = printable(str(fault["msg"]).removeprefix("Value error, "), _LONGEST_MESSAGE)
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
    if fault["type"] == "literal_error":
        message += _switch(fault["input"], fields)
    given = settings.get(field)
    value = _shown(given.value if given is not None else fault["input"])
    source = f" ({given.source})" if given is not None else ""
    return f"`{field}` = {value}{source}: {message}"


def _shown(value: Any) -> str:
    """A value as Python writes it, the end of a long one left out."""
    try:
        text = repr(value[:80] if isinstance(value, str) else value)
    except ValueError:  # Python writes no whole number of over 4,300 digits
        return f"a {type(value).__name__} of too many digits to be shown"
    return text if len(text) <= 80 else text[:77] + "..."


def _expected(fault: Any, field: Any) -> str | None:
    """What a setting takes, where pydantic shows a pattern, or leaves out that it may be unset."""
    if fault["type"] == "string_unicode":
        return "should be text in UTF-8, and holds bytes that are none; give the file another name"
    if fault["type"] == "string_pattern_mismatch":
        shown = getattr(field, "json_schema_extra", None) or {}
        expected = shown.get("expected")
        return f"should be {expected}" if expected else None
    if fault["type"] == "literal_error":
        choices = [choice.strip("'") for choice in re.findall(r"'[^']*'", fault["msg"])]
        choices += ["none"] if getattr(field, "default", 0) is None else []
        return f"should be {', '.join(choices[:-1])} or {choices[-1]}" if choices[1:] else None
    return None


def _switch(value: Any, fields: Mapping[str, Any]) -> str:
    """The setting that switches on what was given as a choice of another, as a half-sentence."""
    name = str(value).strip().lower()
    name = ALIASES.get(name, name)
    if getattr(fields.get(name), "annotation", None) is not bool:
        return ""
    return f", and `{name}` (--{name.replace('_', '-')}) goes with one of them"
