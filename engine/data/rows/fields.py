"""Read single fields of a row; errors name what was expected."""

from collections.abc import Iterable, Mapping
from typing import Any

from engine.storage import strict_json
from engine.tokenization.messages import ConversationError, checked_weight


class RowFault(ValueError):
    """A row that is JSON but not a training row; the message says what was found and expected."""


def json_name(value: Any) -> str:
    """What a JSON value is, in JSON's words."""
    if value is None:
        return "null"
    names = {bool: "a boolean", int: "a number", float: "a number", str: "a text", list: "a list"}
    return names.get(type(value), "an object")


def listed(names: Iterable[str]) -> str:
    """Names in quotes, with commas; at most twelve."""
    shown = [repr(name) for name in list(names)[:12]]
    return ", ".join(shown) if shown else "(none)"


def optional_text(raw: Mapping[str, Any], key: str | None) -> str | None:
    """A text, or None where the key is absent or null."""
    value = raw.get(key) if key is not None else None
    if value is not None and not isinstance(value, str):
        raise RowFault(f"'{key}' is {json_name(value)} where text was expected")
    return value


def only_key(raw: Mapping[str, Any], names: tuple[str, ...]) -> str | None:
    """The one of several names for one thing that a row has a value for."""
    given = [name for name in names if raw.get(name) is not None]
    if len(given) > 1:
        raise RowFault(f"both '{given[0]}' and '{given[1]}', which mean the same; keep one of them")
    return given[0] if given else None


def rating(value: Any) -> int | None:
    """A whole number from 1 to 5, or None."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or value not in range(1, 6):
        raise RowFault(f"'rating' is {value!r} where a whole number from 1 to 5 was expected")
    return int(value)


def weight(value: Any) -> float | None:
    """How much a row counts, more than 0, or None."""
    if value is None:
        return None
    try:
        given = checked_weight(value, "'weight'")
    except ConversationError as error:
        raise RowFault(str(error)) from error
    if given == 0:
        raise RowFault("'weight' is 0, so the row would teach nothing; leave it out")
    return given


def schema_version(value: Any) -> str | int | None:
    """Text or a number, or None."""
    if value is not None and (isinstance(value, bool) or not isinstance(value, str | int)):
        raise RowFault(
            f"'schema_version' is {json_name(value)} where text or a number was expected"
        )
    return value


def tools(value: Any, key: str) -> list[dict[str, Any]] | None:
    """JSON schemas of tools: a list of objects, or of texts that are such, or the whole as text."""
    value = from_text(value, f"'{key}'")
    if value is None:
        return None
    if not isinstance(value, list):
        raise RowFault(f"'{key}' is {json_name(value)} where a list of objects was expected")
    schemas = [from_text(item, f"{key}[{index}]") for index, item in enumerate(value)]
    for index, schema in enumerate(schemas):
        if not isinstance(schema, dict):
            raise RowFault(f"{key}[{index}] is {json_name(schema)} where an object was expected")
    if key == "functions":
        schemas = [{"type": "function", "function": schema} for schema in schemas]
    return schemas or None


def from_text(value: Any, where: str) -> Any:
    """A value that may be JSON text, which `where` names in errors; blank text is no value."""
    if not isinstance(value, str):
        return value
    if not value.strip():
        return None
    try:
        return strict_json.loads(value)
    except strict_json.JSONFault as fault:
        raise RowFault(f"{where} is text that is not JSON: {fault.message}") from None
