"""A model with rows for more tokens than its files have.

The rows of new tokens begin at the mean of the rows of the tokens that there were, in fp32, as
transformers' `resize_token_embeddings` begins them but for its noise. Where the files have spare
rows behind the tokenizer's last token, those are used first: the matrices grow only when the new
tokens need it, and then to the number of tokens. Source: Hewitt 2021, "Initializing New Word
Embeddings for Pretrained Language Models".
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from engine.model_sources.interface.model_source import (
    ModelDescription,
    ModelSource,
    TokenizerSource,
)
from engine.model_sources.interface.view import ModelSourceView, with_key
from engine.model_sources.vocabulary.folder import OtherWords
from kernels.linear.int8 import Int8Weight
from kernels.nf4 import NF4Weight
from models.tensor_layout import Layout

HEAD = "lm_head.weight"
_PART = 1 << 8


@dataclass(frozen=True)
class NewWords:
    """A tokenizer in place of the model's: `known` tokens have rows, of `size` that there are."""

    words: TokenizerSource
    known: int
    size: int

    def rows(self, vocab_size: int) -> int:
        """Rows of the embedding of a model that has `vocab_size`."""
        return max(vocab_size, self.size)


class ResizedDescription(OtherWords):
    """A description of a model with `new` words; see `ModelDescription`."""

    def __init__(self, base: ModelDescription, new: NewWords) -> None:
        self.path, self.words = base.path, new.words
        rows = new.rows(base.config.vocab_size)
        self.config = replace(base.config, vocab_size=rows)
        self.raw_config = with_key(base.raw_config, "vocab_size", rows)
        self.generation_config = base.generation_config


class ResizedSource(OtherWords, ModelSourceView):
    """A model source with `new` words, and rows for them."""

    def __init__(self, base: ModelSource, new: NewWords) -> None:
        super().__init__(base)
        described = ResizedDescription(base, new)
        self.new, self.words = new, new.words
        self.config, self.raw_config = described.config, described.raw_config
        names = base.names()
        embedding = Layout.of_names(base.config, names).path("model.embed_tokens.weight")
        changed = new.size > new.known or self.config.vocab_size != base.config.vocab_size
        self._resized = {embedding, HEAD} & set(names) if changed else set[str]()

    def shape(self, name: str) -> tuple[int, ...]:
        shape = self.base.shape(name)
        return (self.config.vocab_size, *shape[1:]) if name in self._resized else shape

    def tensor(self, name: str) -> torch.Tensor:
        """The tensor; of embedding and head with the rows of new tokens."""
        tensor = self.base.tensor(name)
        if name not in self._resized:
            return tensor
        known, last = min(self.new.known, len(tensor)), self.new.size
        resized = tensor.new_empty(self.shape(name))
        resized[: len(tensor)] = tensor
        resized[known:last] = mean_row(tensor[:known]).to(tensor.dtype)
        return resized

    def codes(self, name: str) -> NF4Weight | Int8Weight | None:
        return None if name in self._resized else self.base.codes(name)


def mean_row(rows: torch.Tensor) -> torch.Tensor:
    """The mean (H,) of rows (n, H) of any type, in fp32 from sums in float64."""
    total = sum(part.double().sum(0) for part in rows.split(_PART))
    assert isinstance(total, torch.Tensor)
    return (total / len(rows)).float()
