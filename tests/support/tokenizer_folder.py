"""Folders with tokenizer files, and a byte-level tokenizer that llama.cpp can read."""

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers

from engine.model_sources.gguf.pre_tokenizers import RULES, words
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

    def tokenizer_files(self) -> dict[str, bytes]:
        return {file.name: file.read_bytes() for file in self.path.iterdir() if file.is_file()}

    def chat_template(self, name: str = "default") -> str | None:
        return None

    def load(self) -> Tokenizer:
        return load_tokenizer(self)


CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def write_byte_tokenizer(folder: Path, size: int, rule: str = "qwen2") -> None:
    """Tokens for the first `size` - 3 printable characters, one merge and two special tokens."""
    letters = [chr(number) for number in (*range(0x61, 0x7B), 0x120, *range(0x21, 0x61))]
    vocab = {letter: number for number, letter in enumerate(letters[: size - 3])}
    vocab["ab"] = len(vocab)
    tokenizer = Backend(models.BPE(vocab, [("a", "b")]))
    tokenizer.pre_tokenizer = words(RULES[rule])
    tokenizer.decoder = decoders.ByteLevel()
    if RULES[rule].nfc:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"eos_token": "<|im_end|>", "chat_template": CHATML}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
