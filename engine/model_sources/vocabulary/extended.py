"""A tokenizer with further tokens, as files that other programs read.

New tokens get the ids behind the last one that there is, in the order of the file, as
`tokenizer.add_tokens` of transformers gives them. Tokens that the tokenizer has already keep their
ids. What comes out is read back before it is used: every earlier token must have its id, and every
new one must be one token.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from engine.errors import CheckpointError, ConfigError, listing
from engine.model_sources.interface.model_source import TokenizerSource
from engine.model_sources.vocabulary.token_file import NewToken
from engine.storage.strict_json import parse_object
from engine.tokenization.tokenizer import load_tokenizer

log = logging.getLogger(__name__)

_JSON, _CONFIG = "tokenizer.json", "tokenizer_config.json"


class ExtendedTokenizer:
    """The tokenizer of `base` with `tokens`; `known` ids were there, `size` ids are there now.

    Raises `ConfigError` where the tokenizer is in a form that cannot be extended.
    """

    def __init__(self, base: TokenizerSource, tokens: Sequence[NewToken]) -> None:
        self._base = base
        self.path, self.raw_config = base.path, base.raw_config
        serialised = base.tokenizer_json()
        if serialised is None:
            raise ConfigError(
                f"--add-tokens extends a tokenizer.json, and {base.path} has none. Write one with "
                "transformers: AutoTokenizer.from_pretrained(MODEL).save_pretrained(FOLDER), and "
                "put it beside the model."
            )
        before = load_tokenizer(base)
        self.known = before.vocab_size
        vocabulary = before.vocabulary()
        present = [token.content for token in tokens if token.content in vocabulary]
        if present:
            log.warning(
                "%d of the tokens to add are there already, and stay as they are: %s",
                len(present), listing(present),
            )  # fmt: skip
        new = [token for token in tokens if token.content not in present]
        self.new_ids = {t.content: self.known + number for number, t in enumerate(new)}
        self._config = _with_declared(base.tokenizer_config(), new, self.known)
        self._json = _with_added(serialised, new, self.known, str(base.path))
        self.size = self.known + len(new)
        after = load_tokenizer(self)
        moved = [
            token
            for token, index in {**vocabulary, **self.new_ids}.items()
            if after.token_to_id(token) != index
        ]
        cut = [t for t, index in self.new_ids.items() if after.encode(t, False) != [index]]
        if moved or cut:
            raise CheckpointError(
                f"{base.path}: with the tokens of --add-tokens its tokenizer would give other ids "
                f"to {listing(moved) or 'none'}, and cut {listing(cut) or 'none'} into several "
                "tokens. Save the tokenizer with transformers' save_pretrained first, or leave "
                "these out."
            )

    def tokenizer_json(self) -> str | None:
        return self._json

    def tokenizer_model(self) -> Path | None:
        return self._base.tokenizer_model()

    def tokenizer_config(self) -> dict[str, Any]:
        return self._config

    def chat_template(self, name: str = "default") -> str | None:
        return self._base.chat_template(name)

    def tokenizer_files(self) -> dict[str, bytes]:
        files = dict(self._base.tokenizer_files())
        files[_JSON] = self._json.encode()
        if _CONFIG in files and self._config != self._base.tokenizer_config():
            files[_CONFIG] = json.dumps(self._config, ensure_ascii=False, indent=2).encode()
        return files


def _with_added(serialised: str, tokens: Sequence[NewToken], first: int, where: str) -> str:
    """tokenizer.json with entries for `tokens`, whose ids begin at `first`."""
    if not tokens:
        return serialised
    content = parse_object(serialised.encode(), f"{where}/{_JSON}")
    added = content.get("added_tokens")
    entries = [{"id": first + n, **token.as_json()} for n, token in enumerate(tokens)]
    content["added_tokens"] = [*(added if isinstance(added, list) else []), *entries]
    return json.dumps(content, ensure_ascii=False, indent=2)


def _with_declared(
    config: dict[str, Any], tokens: Sequence[NewToken], first: int
) -> dict[str, Any]:
    """tokenizer_config.json, which declares `tokens` too where it declares any."""
    declared = config.get("added_tokens_decoder")
    if not isinstance(declared, dict) or not tokens:
        return config
    more = {str(first + number): token.as_json() for number, token in enumerate(tokens)}
    return config | {"added_tokens_decoder": declared | more}
