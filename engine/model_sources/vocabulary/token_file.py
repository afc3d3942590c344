"""The file of --add-tokens: a token a line, or JSON with flags.

    <tool>                                        text: a token on each line that is not empty
    ["<tool>", {"content": "<end>", "special": true}]               JSON: a list
    {"normal": ["<tool>"], "special": ["<end>"]}                    JSON: by kind

A normal token is part of a text, a special one is left out where special tokens are. Flags have the
names of tokenizers' AddedToken, and its defaults: `normalized` is true unless the token is special.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.errors import DataError
from engine.storage import strict_json
from engine.storage.safe_files import MIB, read_text

_FLAGS = ("special", "single_word", "lstrip", "rstrip", "normalized")
_LONGEST = 1000
MOST = 100_000
"""Tokens that a file may add."""


@dataclass(frozen=True)
class NewToken:
    """A token to add, with the flags that say where it is matched."""

    content: str
    special: bool = False
    single_word: bool = False
    lstrip: bool = False
    rstrip: bool = False
    normalized: bool | None = None

    def as_json(self) -> dict[str, Any]:
        """As tokenizer.json spells it, without an id."""
        normalized = not self.special if self.normalized is None else self.normalized
        return {
            "content": self.content,
            "single_word": self.single_word,
            "lstrip": self.lstrip,
            "rstrip": self.rstrip,
            "normalized": normalized,
            "special": self.special,
        }


def read_tokens(path: Path) -> tuple[NewToken, ...]:
    """The tokens of a file, each once. Raises `DataError` naming what is no token."""
    try:
        text = read_text(path, limit=16 * MIB)
    except (OSError, ValueError) as error:
        raise DataError(f"--add-tokens {path} cannot be read: {error}.") from None
    if text.lstrip()[:1] in ("[", "{") and path.suffix == ".json":
        tokens = _from_json(text, path)
    else:
        lines = text.splitlines()
        tokens = [_checked(NewToken(line), path, n) for n, line in enumerate(lines, 1) if line]
    unique = {token.content: token for token in tokens}
    if not unique or len(unique) > MOST:
        raise DataError(
            f"--add-tokens {path} holds {len(unique)} tokens; expected 1 to {MOST:,}: a token a "
            'line, or a .json file with a list, or with {"normal": [...], "special": [...]}.'
        )
    return tuple(unique.values())


def _from_json(text: str, path: Path) -> list[NewToken]:
    try:
        value = strict_json.loads(text)
    except strict_json.JSONFault as error:
        raise DataError(f"--add-tokens {path} is no JSON: {error}.") from None
    if isinstance(value, dict):
        odd = sorted(set(value) - {"normal", "special"})
        if odd or not all(isinstance(part, list) for part in value.values()):
            raise DataError(
                f"--add-tokens {path}: expected lists under normal and special, and found "
                f"{', '.join(map(repr, odd)) or 'something else'} there."
            )
        value = [
            {**_as_object(item), "special": kind == "special"}
            for kind, items in value.items()
            for item in items
        ]
    return [_token(item, path, number) for number, item in enumerate(value, 1)]


def _as_object(item: Any) -> dict[str, Any]:
    return item if isinstance(item, dict) else {"content": item}


def _token(item: Any, path: Path, number: int) -> NewToken:
    entry = _as_object(item)
    flags = {name: value for name, value in entry.items() if name != "content"}
    known = all(name in _FLAGS and isinstance(value, bool) for name, value in flags.items())
    if not isinstance(entry.get("content"), str) or not known:
        raise DataError(
            f"--add-tokens {path}: entry {number} is {str(item)[:80]!r}; expected a text, or an "
            f"object with a text under content and true or false for {', '.join(_FLAGS)}."
        )
    return _checked(NewToken(entry["content"], **flags), path, number)


def _checked(token: NewToken, path: Path, number: int) -> NewToken:
    text = token.content
    if not text.strip() or len(text) > _LONGEST or not text.isprintable():
        raise DataError(
            f"--add-tokens {path}: entry {number}, {text[:40]!r}, is no token: expected 1 to "
            f"{_LONGEST} printable characters, not all of them blanks."
        )
    return token
