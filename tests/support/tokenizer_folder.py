"""A folder with tokenizer files, as the loader sees a model source."""

import json
from pathlib import Path
from typing import Any

from engine.tokenization.tokenizer import Tokenizer, load_tokenizer


class TokenizerFolder:
    """The tokenizer's part of `ModelSource`, for a folder without weights."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def raw_config(self) -> dict[str, Any]:
        file = self.path / "config.json"
        config: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
        return config

    def tokenizer_json(self) -> str | None:
        file = self.path / "tokenizer.json"
        return file.read_text() if file.exists() else None

    def tokenizer_model(self) -> Path | None:
        file = self.path / "tokenizer.model"
        return file if file.exists() else None

    def tokenizer_config(self) -> dict[str, Any]:
        file = self.path / "tokenizer_config.json"
        config: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
        return config

    def tokenizer_files(self) -> dict[str, bytes | Path]:
        return {file.name: file.read_bytes() for file in self.path.iterdir() if file.is_file()}

    def chat_template(self, name: str = "default") -> str | None:
        return None

    def load(self) -> Tokenizer:
        return load_tokenizer(self)  # type: ignore[arg-type]
