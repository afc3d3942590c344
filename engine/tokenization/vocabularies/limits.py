"""Refuse tokenizers that are built to take hours, or all memory.

`tokenizers` does what a file asks for: normalizers that make millions of characters of one, tokens
of megabytes, regular expressions that take for ever. No model has any of these. What can be read
off the file is refused before the library sees it; a tokenizer with expressions that may take long
works in a process that is ended (`tokenizer_process`), for all texts or for long ones.
"""

from __future__ import annotations

import base64
import binascii
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from tokenizers import Tokenizer

from engine.errors import CheckpointError
from engine.patterns import may_backtrack
from engine.storage.safe_files import refuse_many
from engine.tokenization.vocabularies.linear_patterns import takes_linear_time

LONGEST_TOKEN = 10_000
_ALL_TOKENS = 1 << 20
MOST_GROWTH = 1_000
"""Characters that may come of one; real normalizers make up to 18, and most one or two."""

_MOST_VALUES = 8_000_000
"""Values of a tokenizer.json; half a million tokens with as many merges are 2.5 million."""

_LONGEST_PATTERN = 50_000
_SQUARED = 8_192
"""Characters whose square is still little work."""

_LONGEST_WORD = 1_000
_MOST_STEPS = 100
"""Normalizers, pre-tokenizers and decoders; models have up to a dozen."""


def refuse_long_tokens(serialised: str, where: str) -> None:
    """Raise `CheckpointError` for a tokenizer.json with added tokens as no model has.

    What is no JSON is left to the library, which says so.
    """
    refuse_many(serialised.encode("utf-8", "surrogatepass"), _MOST_VALUES, where)
    try:
        content = json.loads(serialised)
    except (ValueError, RecursionError):
        return
    added = content.get("added_tokens") if isinstance(content, dict) else None
    entries = added if isinstance(added, list) else []
    refuse_long((e.get("content") for e in entries if isinstance(e, dict)), where)


def longest_quick_text(backend: Tokenizer, where: str) -> int | None:
    """Characters of a text that a tokenizer cuts in little time for sure; None: of any.

    It is 0 where the time may double with each character, and some thousands where it may grow
    with the square. Raises `CheckpointError` for a tokenizer that makes very much of little.
    """
    slow, steps = False, 0
    # WordPiece tries all ends of a word, and from each again.
    linear = getattr(backend.model, "max_input_chars_per_word", 0) <= _LONGEST_WORD
    for part in (backend.normalizer, backend.pre_tokenizer, backend.decoder):
        growth = 1.0
        for step in _steps(part):
            steps += 1
            growth *= _growth(step)
            if growth > MOST_GROWTH:
                raise CheckpointError(
                    f"{where}: the normalizer of its tokenizer makes over {MOST_GROWTH} "
                    "characters of one. No model has such a tokenizer; take another one."
                )
            for pattern in _patterns(step):
                slow |= _is_slow(pattern, where)
                linear &= takes_linear_time(pattern)
    return 0 if slow or steps > _MOST_STEPS else None if linear else _SQUARED


def refuse_long(texts: Iterable[Any], where: str) -> None:
    """Raise `CheckpointError` for tokens that are as long as no model's are."""
    total = 0
    for text in texts:
        size = len(text) if isinstance(text, str) else 0
        total += size
        if size > LONGEST_TOKEN:
            raise CheckpointError(
                f"{where}: its tokenizer has an added token of {size} characters; the longest that "
                f"is read has {LONGEST_TOKEN}. No model has such a token; take another tokenizer."
            )
    if total > _ALL_TOKENS:
        raise CheckpointError(
            f"{where}: the added tokens of its tokenizer have {total} characters together, where "
            f"at most {_ALL_TOKENS} are read. No model has as many; take another tokenizer."
        )


def _steps(part: Any) -> Iterator[Mapping[str, Any]]:
    """The steps of a normalizer, pre-tokenizer or decoder, those of sequences one by one."""
    waiting = [] if part is None else [json.loads(part.__getstate__())]
    while waiting:
        step = waiting.pop()
        if not isinstance(step, dict):
            continue
        inner = [v for k, v in step.items() if isinstance(v, list) and k.endswith(_LISTS)]
        if inner:
            waiting += [one for steps in inner for one in steps]
        else:
            yield step


_LISTS = ("normalizers", "pretokenizers", "decoders")
_NOTHING = re.compile(r"[*?^$|]|\{0|\{,|\\[AzZbBG]|\(\?")
"""What stands in expressions that can match nothing, on the safe side."""


def _growth(step: Mapping[str, Any]) -> float:
    """How many characters a step may make of one."""
    kind = step.get("type")
    if kind == "Replace":
        content = len(str(step.get("content") or ""))
        pattern = step.get("pattern")
        matched = pattern.get("String") if isinstance(pattern, dict) else None
        if isinstance(matched, str) and matched:
            return max(1.0, content / len(matched))
        # An expression that can match nothing does so beside every character.
        expression = next(_patterns(step), "^")
        return max(1.0, content + (_NOTHING.search(expression) is not None))
    if kind == "Prepend":
        return 1.0 + len(str(step.get("prepend") or ""))
    if kind == "Precompiled":
        return _longest_rule(str(step.get("precompiled_charsmap") or ""))
    return 1.0


def _longest_rule(encoded: str) -> float:
    """The longest text of a compiled table of rules.

    The table is the size of a trie, the trie, and texts that end with a zero byte:
    https://github.com/google/sentencepiece/blob/master/src/normalizer.cc
    """
    try:
        table = base64.b64decode(encoded)
    except (binascii.Error, ValueError):
        return 1.0
    return longest_rule(table)


def longest_rule(table: bytes) -> float:
    """The most characters that a compiled table of rules makes of one."""
    start = 4 + int.from_bytes(table[:4], "little")
    return max(1.0, *map(len, table[start:].split(b"\0")))


def _patterns(step: Mapping[str, Any]) -> Iterator[str]:
    pattern = step.get("pattern")
    own = pattern.get("Regex") if isinstance(pattern, dict) else None
    if isinstance(own, str):
        yield own


def _is_slow(pattern: str, where: str) -> bool:
    if len(pattern) > _LONGEST_PATTERN:
        raise CheckpointError(
            f"{where}: its tokenizer has a regular expression of {len(pattern)} characters, where "
            f"at most {_LONGEST_PATTERN} are read. No model has such a tokenizer; take another one."
        )
    return may_backtrack(pattern)
