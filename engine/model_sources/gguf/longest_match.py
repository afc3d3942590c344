"""Tokenizers that take the longest token, and their spelling in GGUF.

A text is read from its start, and the longest of all tokens that fits comes next; where none does,
one character is unknown. For `tokenizers` this is a rule that cuts a text into such pieces, the
longest first, and a vocabulary of whole pieces. llama.cpp has the same under the name "rwkv", whose
tokens are spelled with escapes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

MOST_TOKENS = 4096
"""The rule names every token of several characters."""

_ESCAPES = {"\\": "\\\\", "\n": "\\n", "\r": "\\r", "\t": "\\t"}
_ESCAPED = re.compile(rb"\\(x[0-9a-fA-F]{2}|.)", re.DOTALL)
_MEANT = {b"t": b"\t", b"n": b"\n", b"r": b"\r"}


def longest_match(tokens: Sequence[str], unknown: str) -> Tokenizer:
    """The tokenizer in which `tokens[i]` has the id i and any other character is `unknown`."""
    vocabulary = {token: index for index, token in enumerate(tokens)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token=unknown))
    longer = sorted((token for token in tokens if len(token) > 1), key=len, reverse=True)
    # [\s\S] is any character, a line end too: what no longer token covers stands alone.
    pieces = "|".join([*map(re.escape, longer), r"[\s\S]"])
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(pieces), "isolated")
    backend.decoder = decoders.Fuse()
    return backend


def is_longest_match(state: dict[str, Any]) -> bool:
    """Whether a parsed tokenizer.json is one that `longest_match` makes."""
    model = state["model"]
    if model.get("type") != "WordLevel" or len(model["vocab"]) > MOST_TOKENS:
        return False
    tokens = sorted(model["vocab"], key=model["vocab"].__getitem__)
    made = json.loads(longest_match(tokens, model["unk_token"]).to_str())
    return all(state[part] == made[part] for part in ("normalizer", "pre_tokenizer", "decoder"))


def escaped(token: str) -> str:
    """A token as a GGUF file of the kind "rwkv" spells it."""
    return "".join(_ESCAPES.get(sign, sign) for sign in token)


def unescaped(tokens: Iterable[str]) -> list[str] | None:
    """The tokens that a GGUF file of the kind "rwkv" spells; None where one is no text."""
    try:
        return [_ESCAPED.sub(_meant, token.encode()).decode() for token in tokens]
    except UnicodeDecodeError:
        return None


def _meant(match: re.Match[bytes]) -> bytes:
    sign = match[1]
    return bytes.fromhex(sign[1:].decode()) if len(sign) == 3 else _MEANT.get(sign, sign)
