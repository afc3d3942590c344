"""Perplexity over trained tokens: exp(sum of losses / number of tokens), padding never counted."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from models.decoder import Decoder

if TYPE_CHECKING:
    from engine.config.choices import Quantization
    from engine.data.examples import Example

_TOKENS_PER_BATCH = 2048


@dataclass(frozen=True)
class EvalResult:
    """`loss` is the mean over `tokens` trained tokens, in nats; `perplexity` its exponential."""

    perplexity: float
    loss: float
    tokens: int
    rows: int
    seconds: float


def by_tokens(examples: Iterable[Example], budget: int) -> Iterator[list[Example]]:
    """Consecutive examples with at most `budget` tokens together, at least one at a time."""
    group: list[Example] = []
    size = 0
    for example in examples:
        if group and size + len(example) > budget:
            yield group
            group, size = [], 0
        group.append(example)
        size += len(example)
    if group:
        yield group


@torch.no_grad()
def evaluate_examples(
    model: Decoder, examples: Sequence[Example], tokens_per_batch: int = _TOKENS_PER_BATCH
) -> EvalResult:
    """Token-weighted loss of `examples`; dropout is off, and the model's mode is left as it was."""
    from engine.data.loader import collate

    started, was_training = time.perf_counter(), model.training
    model.eval()
    total, tokens = torch.zeros((), dtype=torch.float64), 0
    for group in by_tokens(sorted(examples, key=len, reverse=True), tokens_per_batch):
        batch = collate(group)
        loss = model.loss(
            batch.input_ids.to(model.ids_device),
            batch.labels.to(model.device),
            batch.cu_seqlens.to(model.device),
            num_items=1,
        )
        total += loss.double().cpu()
        tokens += batch.trained_tokens
    model.train(was_training)
    mean = float(total) / max(tokens, 1)
    perplexity = math.exp(mean) if mean < 700 else math.inf
    return EvalResult(perplexity, mean, tokens, len(examples), time.perf_counter() - started)


def evaluate(
    model: str | Path,
    data: str | Path | Sequence[str | Path],
    adapter: str | Path | None = None,
    *,
    batch_size: int | None = None,
    max_length: int = 2048,
    quantize: Quantization | None = None,
    device: str = "auto",
    dtype: str = "auto",
    min_rating: int | None = None,
    category: str | None = None,
    limit_rows: int | None = None,
    template_kwargs: Mapping[str, Any] | None = None,
) -> EvalResult:
    """Perplexity of a model, with an adapter or without, on the rows of `data`.

    `batch_size` only bounds memory (rows of up to `max_length` tokens at a time); the result does
    not depend on it. Raises `DataError`, `CheckpointError` or `ConfigError`.
    """
    from engine.data.dataset import load_rows
    from engine.data.examples import build_examples, check_ids
    from engine.device import resolve_device, resolve_dtype
    from engine.model_sources.load_model import attach_adapter, build_model
    from engine.model_sources.open import open_model_source
    from engine.tokenization.tokenizer import load_tokenizer

    where = resolve_device(device)
    source = open_model_source(model)
    rows = load_rows(data, min_rating=min_rating, category=category)[:limit_rows]
    examples, _ = build_examples(
        rows, load_tokenizer(source), max_length, template_kwargs=template_kwargs
    )
    check_ids(examples, source.config.vocab_size)
    decoder = build_model(
        source, quantization=quantize, device=where, dtype=resolve_dtype(dtype, where)
    )
    if adapter is not None:
        attach_adapter(decoder, adapter)
    budget = batch_size * max_length if batch_size else _TOKENS_PER_BATCH
    return evaluate_examples(decoder, examples, budget)
