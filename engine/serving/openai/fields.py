"""Read the fields of a request's JSON object."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

from engine.data.rows.fields import json_name
from engine.serving.openai.api_errors import ApiError, Notes, wrong
from engine.storage import strict_json


def parse_body(body: bytes) -> dict[str, Any]:
    """The JSON object of a request. Raises `ApiError` for anything else."""
    try:
        value = strict_json.loads(body.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ApiError(
            400, f"the body is not UTF-8 text (byte {error.start}); send JSON in UTF-8"
        ) from None
    except strict_json.JSONFault as fault:
        raise ApiError(
            400, f"the body is not acceptable JSON: {fault.message} (character {fault.position})"
        ) from None
    if not isinstance(value, dict):
        raise ApiError(400, f"the body is {json_name(value)} where a JSON object was expected")
    return value


class Fields:
    """The fields of one JSON object, taken one by one; null is as good as absent.

    Args:
        body: the object.
        where: what errors call it: "" for the request itself, else a path such as `tools[0].`.
    """

    def __init__(self, body: Mapping[str, Any], where: str = "") -> None:
        self._body, self._where = body, where
        self._taken: set[str] = set()

    def given(self, name: str) -> Any:
        """A field's value as it is, or None."""
        self._taken.add(name)
        return self._body.get(name)

    def number(self, name: str, least: float, most: float) -> float | None:
        value = self.given(name)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self._wrong(name, value, f"a number from {least:g} to {most:g}")
        if not least <= value <= most:
            raise self._wrong(name, value, f"a number from {least:g} to {most:g}")
        return float(value)

    def whole(self, name: str, least: int, most: int) -> int | None:
        value = self.given(name)
        if value is None:
            return None
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            raise self._wrong(name, value, f"a whole number from {least} to {most}")
        return value

    def flag(self, name: str) -> bool | None:
        value = self.given(name)
        if value is not None and not isinstance(value, bool):
            raise self._wrong(name, value, "true or false")
        return value

    def text(self, name: str) -> str | None:
        value = self.given(name)
        if value is not None and not isinstance(value, str):
            raise self._wrong(name, value, "text")
        return value

    def mapping(self, name: str) -> dict[str, Any] | None:
        value = self.given(name)
        if value is not None and not isinstance(value, dict):
            raise self._wrong(name, value, "an object")
        return value

    def items(self, name: str) -> list[Any] | None:
        value = self.given(name)
        if value is not None and not isinstance(value, list):
            raise self._wrong(name, value, "a list")
        return value

    def rest(self, ignored: frozenset[str], refused: Mapping[str, str], notes: Notes) -> None:
        """Judge the fields that nobody took.

        Those of `refused` would change the answer and are an error with that reason; a name next to
        one that is read is a slip of the pen and an error too; all others are noted as ignored.
        """
        for name, value in self._body.items():
            if name in self._taken or value is None:
                continue
            if name in refused and not _neutral(value):
                raise wrong(name, f"{name} is not done here: {refused[name]}", "unsupported")
            near = difflib.get_close_matches(name, self._taken, n=1, cutoff=0.85)
            if near and name not in ignored and name not in refused:
                raise wrong(name, f"there is no parameter {name[:80]!r}; did you mean {near[0]!r}?")
            notes.ignored.append(name[:80])

    def _wrong(self, name: str, value: Any, expected: str) -> ApiError:
        scalar = value is None or isinstance(value, bool | int | float | str)
        shown = repr(value)[:80] if scalar else json_name(value)
        return wrong(
            f"{self._where}{name}", f"{self._where}{name} is {shown} where {expected} was expected"
        )


def _neutral(value: Any) -> bool:
    """Whether a value asks for nothing: false, empty, zero, or a factor of one."""
    return not value or (isinstance(value, int | float) and value == 1 and value is not True)
