"""Switches of a tokenizer's files: true, false or absent."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from engine.errors import CheckpointError


def switch(settings: Mapping[str, Any], key: str, default: bool = False, of: str = "") -> bool:
    """What `key` says; `default` where it is absent or null.

    The text "false" would count as true in a program that does not look. Raises `CheckpointError`
    for what is no switch, naming what it is `of`.
    """
    value = settings.get(key)
    if value is None:
        return default
    if type(value) in (bool, int) and value in (0, 1):
        return bool(value)
    raise CheckpointError(
        f"the tokenizer's files give {str(value)[:80]!r} for {key}{f' of {of[:120]}' if of else ''}"
        "; expected true or false. Fetch the tokenizer's files again."
    )
