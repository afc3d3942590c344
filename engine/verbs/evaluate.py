"""`engine eval`: the perplexity of a model on rows of data."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from engine.config.tasks.inference import EvalSettings
from engine.data.dataset import load_rows
from engine.data.examples import build_examples, check_ids
from engine.device import resolve_device
from engine.inference.loading import load_decoder
from engine.inference.perplexity import TOKENS_PER_BATCH, EvalResult, evaluate_examples
from engine.model_sources.open import open_model_source
from engine.tokenization.tokenizer import load_tokenizer


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
    resolve_device(settings.device)  # refused before any file is read
    source = open_model_source(settings.model)
    rows = load_rows(settings.data, min_rating=settings.min_rating, category=settings.category)
    examples, _ = build_examples(
        rows[: settings.limit_rows],
        load_tokenizer(source),
        settings.max_length,
        template_kwargs=settings.chat_template_kwargs,
    )
    check_ids(examples, source.config.vocab_size)
    decoder = load_decoder(source, settings)
    tokens = settings.batch_size * settings.max_length if settings.batch_size else TOKENS_PER_BATCH
    return evaluate_examples(decoder, examples, tokens)
