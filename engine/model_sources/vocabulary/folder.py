"""A tokenizer's files and chat templates, as a folder holds them.

Of chat templates, `chat_template.jinja` wins over the key in `tokenizer_config.json`, which wins
over `chat_template.json`, as in transformers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from engine.errors import ConfigError
from engine.model_sources.interface.model_source import TokenizerSource
from engine.storage.safe_files import (
    MIB,
    read_json_object,
    read_regular,
    read_text,
    refuse_stand_in,
)

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
_TEMPLATE_LIMIT = MIB


class TokenizerFolder:
    """What the folder `path` says of a tokenizer and its chat templates; it need hold no model."""

    raw_config: dict[str, Any]

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self.raw_config = {}

    def tokenizer_json(self) -> str | None:
        path = self.path / "tokenizer.json"
        return read_text(path, limit=256 * MIB) if path.exists() else None

    def tokenizer_model(self) -> Path | None:
        path = self.path / "tokenizer.model"
        return path if path.exists() else None

    def tokenizer_config(self) -> dict[str, Any]:
        return self._optional_json("tokenizer_config.json", 16 * MIB)

    def chat_template(self, name: str = "default") -> str | None:
        default = name == "default"
        jinja = self.path / (
            "chat_template.jinja" if default else f"additional_chat_templates/{name}.jinja"
        )
        if jinja.exists():
            return read_text(jinja, _TEMPLATE_LIMIT)
        for file in ("tokenizer_config.json", "chat_template.json"):
            value = self._optional_json(file, 16 * MIB).get("chat_template")
            if value is not None:
                return _named_template(value, name, self.path / file)
        return None

    def tokenizer_files(self) -> dict[str, bytes]:
        extra = sorted(self.path.glob("additional_chat_templates/*.jinja"))
        names = [name for name in TOKENIZER_FILES if (self.path / name).exists()]
        names += [str(path.relative_to(self.path)) for path in extra]
        files = {name: read_regular(self.path / name, 256 * MIB) for name in names}
        for name, data in files.items():
            refuse_stand_in(data, str(self.path / name))
        return files

    def _optional_json(self, name: str, limit: int = 4 * MIB) -> dict[str, Any]:
        path = self.path / name
        return read_json_object(path, ConfigError, limit) if path.exists() else {}


class OtherWords:
    """The tokenizer of `words` in place of a model's own; see `TokenizerSource`."""

    words: TokenizerSource

    def tokenizer_json(self) -> str | None:
        return self.words.tokenizer_json()

    def tokenizer_model(self) -> Path | None:
        return self.words.tokenizer_model()

    def tokenizer_config(self) -> dict[str, Any]:
        return self.words.tokenizer_config()

    def chat_template(self, name: str = "default") -> str | None:
        return self.words.chat_template(name)

    def tokenizer_files(self) -> dict[str, bytes]:
        return self.words.tokenizer_files()


def _named_template(value: Any, name: str, source: Path) -> str | None:
    """The template of a `chat_template` value: a text, or a list of {name, template}."""
    if isinstance(value, list):
        items = [item for item in value if isinstance(item, dict)]
        named = {str(item.get("name")): item.get("template") for item in items}
        if name != "default" and name not in named:
            return None
        value = named.get(name)
    elif name != "default":
        return None
    if not isinstance(value, str) or len(value) > _TEMPLATE_LIMIT:
        raise ConfigError(
            f"{source}: chat_template is neither a text nor a list with one named '{name}'."
        )
    return value
