"""Perplexity: exp(sum of losses / number of trained tokens); padding never counts."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch

from engine.data.batches.loader import collate
from engine.data.examples import Example
from models.decoder import Decoder
from models.layers.context import DEFAULT_SETTINGS, StepSettings

TOKENS_PER_BATCH = 2048


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
    model: Decoder,
    examples: Sequence[Example],
    tokens_per_batch: int = TOKENS_PER_BATCH,
    settings: StepSettings = DEFAULT_SETTINGS,
) -> EvalResult:
    """Token-weighted loss of `examples`; dropout is off, and the model's mode is left as it was."""
    started, was_training = time.perf_counter(), model.training
    model.eval()
    total, tokens = torch.zeros((), dtype=torch.float64), 0
    for group in by_tokens(sorted(examples, key=len, reverse=True), tokens_per_batch):
        batch = collate(group)
        loss = model.batch_loss(batch, settings, num_items=1)
        total += loss.double().cpu()
        tokens += batch.trained_tokens
    model.train(was_training)
    mean = float(total) / max(tokens, 1)
    perplexity = math.exp(mean) if mean < 700 else math.inf
    return EvalResult(perplexity, mean, tokens, len(examples), time.perf_counter() - started)
