"""`engine eval`: the perplexity of a model on rows of data."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from engine.config.spelling import given_chunk
from engine.config.tasks.inference import EvalSettings
from engine.data.batches.loader import split_heldout
from engine.data.dataset import RowChoice, read_chosen
from engine.data.examples import build_examples, check_ids
from engine.data.rendering import Learning
from engine.data.rows import Row
from engine.data.sources.resolve import data_files
from engine.device import resolve_device
from engine.inference.loading import check_adapter, load_decoder
from engine.inference.parts import categories_of, parts_of
from engine.inference.perplexity import TOKENS_PER_BATCH, EvalResult, evaluate_examples
from engine.model_sources.adapter_path import adapter_path
from engine.model_sources.interface.model_source import ModelSource
from engine.model_sources.open import open_model_source
from engine.model_sources.vocabulary.of_adapter import words_of
from engine.tokenization.tokenizer import Tokenizer, load_tokenizer
from engine.training.determinism import deterministic
from engine.training.row_set import with_system
from models.decoder import Decoder
from models.layers.context import StepSettings


def evaluate(
    model: str | Path,
    data: str | Path | Sequence[str | Path],
    adapter: str | Path | None = None,
    **options: Any,
) -> EvalResult:
    """Perplexity of a model, with an adapter or without, on the rows of `data`.

    `options` are the other settings of `EvalSettings`. Raises as `evaluate_with`.
    """
    paths = data if isinstance(data, str | Path) else list(data)
    given: dict[str, Any] = {"model": model, "data": paths, "adapter": adapter}
    return evaluate_with(EvalSettings(**given, **options))


def evaluate_with(settings: EvalSettings) -> EvalResult:
    """Perplexity as `settings` ask for it.

    `batch_size` only bounds memory (rows of up to `max_length` tokens at a time); the result does
    not depend on it. Raises `DataError`, `CheckpointError` or `ConfigError`.
    """
    with loaded(settings) as model:
        return model.perplexity()


@dataclass
class LoadedModel:
    """A model with its adapter and tokenizer, as `settings` ask for them.

    The weights are read when they are first used, so that a bad row is refused before.
    """

    settings: EvalSettings
    source: ModelSource
    tokenizer: Tokenizer

    @cached_property
    def decoder(self) -> Decoder:
        """The graph with its weights. Raises `CheckpointError` or `ConfigError`."""
        settings = self.settings
        head_8bit = settings.head_precision == "8bit"
        return load_decoder(
            self.source, settings, double_quant=settings.double_quant, head_8bit=head_8bit
        )

    def perplexity(self) -> EvalResult:
        """Perplexity over the trained tokens of the settings' rows, and the loss of every part."""
        settings = self.settings
        rows = _rows(settings)
        examples, _ = build_examples(
            rows,
            self.tokenizer,
            settings.max_length,
            template_kwargs=settings.chat_template_kwargs,
            bad_rows=settings.bad_lines,
            learning=Learning.of(settings),
        )
        check_ids(examples, max(self.source.config.vocab_size, self.tokenizer.vocab_size))
        bound = settings.batch_size
        tokens = bound * settings.max_length if bound else TOKENS_PER_BATCH
        how = StepSettings(
            loss_chunk_tokens=given_chunk(settings.loss_chunk_tokens),
            mlp_tile_tokens=settings.mlp_tile_tokens,
        )
        parts = parts_of(examples, categories_of(rows))
        return evaluate_examples(self.decoder, examples, tokens, how, parts)


@contextmanager
def loaded(settings: EvalSettings) -> Iterator[LoadedModel]:
    """The model of `settings` for as long as the block lasts.

    Raises `DataError`, `CheckpointError` or `ConfigError`.
    """
    device = resolve_device(settings.device)  # refused before any file is read
    if settings.data:
        data_files(settings.data, settings.query)
    check_adapter(settings)
    source = open_model_source(settings.model)
    words = words_of(source, [adapter_path(path) for path, _ in settings.adapter])
    model = LoadedModel(settings, source, load_tokenizer(words, settings.template_date))
    with deterministic(device, settings.deterministic):
        yield model


def _rows(settings: EvalSettings) -> list[Row]:
    """The rows to evaluate, chosen as `engine train` chooses those that it holds out."""
    rows, _ = read_chosen(settings.data, RowChoice.of(settings, settings.category))
    rows = rows[: settings.limit_rows]
    if settings.heldout:
        rows = split_heldout(rows, settings.heldout, settings.seed)[1]
    return [with_system(row, settings.system_prompt) for row in rows]
