"""A tokenizer.json in place of an unknown GGUF tokenizer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from engine.errors import ConfigError
from engine.storage.safe_files import MIB, read_text

_INSIDE = "tokenizer.huggingface.json"
# llama.cpp's converter fills ids that the vocabulary lacks with such tokens.
_FILLER = "[PAD"


def stand_in(
    tokens: Sequence[str], metadata: Mapping[str, Any], beside: Path | None
) -> Tokenizer | None:
    """The tokenizer of a tokenizer.json inside or beside a GGUF file, or None where there is none.

    Args:
        tokens: the vocabulary of the file; every token must have the same id in both.
        metadata: of the file; `tokenizer.huggingface.json` is used.
        beside: where a tokenizer.json may lie.

    Raises:
        ConfigError: there is one, and it is damaged or that of another vocabulary.
    """
    serialised, name = metadata.get(_INSIDE), _INSIDE
    if not isinstance(serialised, str):
        if beside is None or not beside.exists():
            return None
        serialised, name = read_text(beside, 256 * MIB), str(beside)
    try:
        tokenizer = Tokenizer.from_str(serialised)
    except Exception as error:  # The library raises bare Exceptions.
        raise ConfigError(
            f"{name} cannot be used as the tokenizer of this GGUF file ({str(error)[:200]}). "
            "Fetch it again."
        ) from error
    differ = [
        number
        for number, token in enumerate(tokens)
        if tokenizer.id_to_token(number) != token
        and not (tokenizer.id_to_token(number) is None and token.startswith(_FILLER))
    ]
    if differ:
        number = differ[0]
        raise ConfigError(
            f"{name} belongs to another model than this GGUF file: {len(differ)} of "
            f"{len(tokens)} tokens differ, the first with the id {number}: {tokens[number]!r} in "
            f"the GGUF file, {tokenizer.id_to_token(number)!r} there. Put the right file there."
        )
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer
