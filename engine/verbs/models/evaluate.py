"""`engine eval`: the perplexity of a model on rows of data."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from engine.config.spelling import given_chunk
from engine.config.tasks.inference import EvalSettings
from engine.data.batches.loader import split_heldout
from engine.data.dataset import data_files, read_rows
from engine.data.examples import build_examples, check_ids
from engine.data.rows import Row
from engine.device import resolve_device
from engine.inference.loading import check_adapter, load_decoder
from engine.inference.perplexity import TOKENS_PER_BATCH, EvalResult, evaluate_examples
from engine.model_sources.open import open_model_source
from engine.tokenization.tokenizer import load_tokenizer
from engine.training.determinism import deterministic
from engine.training.prepare import with_system
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
    device = resolve_device(settings.device)  # refused before any file is read
    data_files(settings.data)
    check_adapter(settings)
    source = open_model_source(settings.model)
    examples, _ = build_examples(
        _rows(settings),
        load_tokenizer(source, settings.template_date),
        settings.max_length,
        template_kwargs=settings.chat_template_kwargs,
        bad_rows=settings.bad_lines,
    )
    check_ids(examples, source.config.vocab_size)
    head_8bit = settings.head_precision == "8bit"
    tokens = settings.batch_size * settings.max_length if settings.batch_size else TOKENS_PER_BATCH
    how = StepSettings(
        loss_chunk_tokens=given_chunk(settings.loss_chunk_tokens),
        mlp_tile_tokens=settings.mlp_tile_tokens,
    )
    with deterministic(device, settings.deterministic):
        decoder = load_decoder(
            source, settings, double_quant=settings.double_quant, head_8bit=head_8bit
        )
        return evaluate_examples(decoder, examples, tokens, how)


def _rows(settings: EvalSettings) -> list[Row]:
    """The rows to evaluate, chosen as `engine train` chooses those that it holds out."""
    rows, _ = read_rows(settings.data, settings.min_rating, settings.category, settings.bad_lines)
    rows = rows[: settings.limit_rows]
    if settings.heldout:
        rows = split_heldout(rows, settings.heldout, settings.seed)[1]
    return [with_system(row, settings.system_prompt) for row in rows]
