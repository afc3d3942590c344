"""The tokenizer that an adapter brings, and its embedding's rows.

An adapter that holds rows of the embedding was trained with the tokenizer in its folder, which may
have more tokens than the model's: that is the one to read texts with. An adapter of low-rank pairs
alone leaves the words to its model, whatever stands in its folder.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from engine.model_sources.interface.model_source import TokenizerSource
from engine.model_sources.safetensors.file import SafetensorsFile
from engine.model_sources.vocabulary.folder import TokenizerFolder

_WEIGHTS = "adapter_model.safetensors"
_VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json")
_EMBEDDING = "embed_tokens."


@dataclass(frozen=True)
class BroughtWords:
    """A tokenizer's folder beside an adapter, and the rows of its embedding, 0 if not all there."""

    folder: TokenizerFolder
    rows: int


def brought_words(adapter: Path) -> BroughtWords | None:
    """What the adapter in folder `adapter` brings; None where it leaves the words as they are."""
    weights = adapter / _WEIGHTS
    if not weights.is_file() or not any((adapter / name).is_file() for name in _VOCABULARIES):
        return None
    file = SafetensorsFile(weights)
    named = [name for name in file.keys() if f".{_EMBEDDING}" in name]  # noqa: SIM118
    if not named:
        return None
    whole = (file.shape(n)[0] for n in named if n.endswith(".weight") and "lora_" not in n)
    return BroughtWords(TokenizerFolder(adapter), max(whole, default=0))


def words_of(source: TokenizerSource, adapters: Iterable[Path]) -> TokenizerSource:
    """The tokenizer of a model with these adapters: the first that one of them brings."""
    brought = (brought_words(path) for path in adapters)
    return next((words.folder for words in brought if words is not None), source)
