"""Perplexity: exp(sum of losses / number of trained tokens); padding never counts."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TypeVar

import torch

from engine.data.batches.loader import collate
from engine.data.examples import Example
from engine.inference.parts import PartNames
from kernels.loss.cross_entropy import PLAIN
from kernels.runtime.ranks import ONE_RANK, Ranks, host_sums
from models.decoder import Decoder
from models.layers.context import DEFAULT_SETTINGS, StepSettings
from models.layers.packed_batch import PackedBatch

TOKENS_PER_BATCH = 2048
T = TypeVar("T")


@dataclass(frozen=True)
class EvalResult:
    """`loss` is the mean over `tokens` trained tokens, in nats; `perplexity` its exponential.

    `parts` has the loss of every category and source, where there are several: `category/NAME` and
    `source/FILE`.
    """

    perplexity: float
    loss: float
    tokens: int
    rows: int
    seconds: float
    parts: dict[str, float] = field(default_factory=dict)


def grouped(items: Iterable[T], budget: int, length: Callable[[T], int]) -> Iterator[list[T]]:
    """Consecutive items of at most `budget` tokens together, at least one at a time."""
    group: list[T] = []
    size = 0
    for item in items:
        tokens = length(item)
        if group and size + tokens > budget:
            yield group
            group, size = [], 0
        group.append(item)
        size += tokens
    if group:
        yield group


def by_tokens(examples: Iterable[Example], budget: int) -> Iterator[list[Example]]:
    """Consecutive examples with at most `budget` tokens together, at least one at a time."""
    return grouped(examples, budget, len)


@torch.no_grad()
def evaluate_examples(
    model: Decoder,
    examples: Sequence[Example],
    tokens_per_batch: int = TOKENS_PER_BATCH,
    settings: StepSettings = DEFAULT_SETTINGS,
    parts: PartNames | None = None,
    ranks: Ranks = ONE_RANK,
) -> EvalResult:
    """Token-weighted loss of `examples`; dropout is off, and the model's mode is left as it was.

    It is the plain cross-entropy: weights of rows, smoothing and z-loss are of training. `parts`
    are the categories and sources whose losses are asked for as well. The batches are dealt to
    `ranks`, which all have the result.
    """
    started, was_training = time.perf_counter(), model.training
    model.eval()
    whole, by_part = _Sum(), dict[str, _Sum]()
    for names, group in _grouped(examples, parts):
        own = _sum_of(model, group, tokens_per_batch, settings, ranks)
        for added in (whole, *(by_part.setdefault(name, _Sum()) for name in names)):
            added.loss += own.loss
            added.tokens += own.tokens
    model.train(was_training)
    seconds = time.perf_counter() - started
    losses = {name: by_part[name].mean for name in sorted(by_part)}
    return EvalResult(whole.perplexity, whole.mean, whole.tokens, len(examples), seconds, losses)


@dataclass
class _Sum:
    """A sum of losses over trained tokens."""

    loss: float = 0.0
    tokens: int = 0

    @property
    def mean(self) -> float:
        return self.loss / max(self.tokens, 1)

    @property
    def perplexity(self) -> float:
        return math.exp(self.mean) if self.mean < 700 else math.inf


def _grouped(
    examples: Sequence[Example], parts: PartNames | None
) -> list[tuple[tuple[str, ...], list[Example]]]:
    """The examples by the parts that they belong to, in an order that their names decide."""
    groups: dict[tuple[str, ...], list[Example]] = {}
    for example in examples:
        names = () if parts is None else parts.of(example)
        groups.setdefault(names, []).append(example)
    return [(names, groups[names]) for names in sorted(groups)]


def _sum_of(
    model: Decoder,
    examples: list[Example],
    tokens_per_batch: int,
    settings: StepSettings,
    ranks: Ranks,
) -> _Sum:
    total, tokens = torch.zeros((), dtype=torch.float64), 0
    groups = list(by_tokens(sorted(examples, key=len, reverse=True), tokens_per_batch))
    for batch in dealt_batches([partial(collate, group) for group in groups], ranks):
        loss = model.batch_loss(batch, replace(settings, loss_terms=PLAIN), num_items=1)
        total += loss.double().cpu()
        tokens += batch.trained_tokens
    # Of a batch whose tokens several ranks share, each has the loss of its own.
    (loss_sum,) = host_sums(model.context_ranks, float(total))
    loss_sum, count = host_sums(ranks, loss_sum, tokens)
    return _Sum(loss_sum, int(count))


def dealt_batches(
    makers: Sequence[Callable[[], PackedBatch]], ranks: Ranks
) -> Iterator[PackedBatch]:
    """The batches of this rank, made one after the other; every rank has as many of them."""
    own = makers[ranks.rank :: ranks.size]
    for make in own:
        yield make()
    for _ in range(-(-len(makers) // ranks.size) - len(own)):
        yield PackedBatch.idle()


@torch.no_grad()
def evaluate_rows(
    model: Decoder, examples: Sequence[Example], tokens_per_batch: int = TOKENS_PER_BATCH
) -> tuple[EvalResult, list[tuple[float, int]]]:
    """What `evaluate_examples` gives, and of each example its loss in nats and trained tokens.

    The layers run once for both; the rows are in the order in which they were given.
    """
    started, whole = time.perf_counter(), _Sum()
    order = sorted(range(len(examples)), key=lambda number: -len(examples[number]))
    rows: dict[int, tuple[float, int]] = {}
    for numbers in grouped(order, tokens_per_batch, lambda number: len(examples[number])):
        batch = collate([examples[number] for number in numbers]).to(model.device, model.ids_device)
        states = model.model.norm(model.hidden_states(batch).index_select(0, batch.trained))
        head = model.head
        whole.loss += float(head.loss(states, batch.targets, 1.0))
        whole.tokens += batch.trained_tokens
        start = 0
        for number in numbers:
            tokens = examples[number].trained_tokens
            part = slice(start, start + tokens)
            loss = head.loss(states[part], batch.targets[part], 1.0)
            rows[number] = float(loss), tokens
            start = part.stop
    seconds = time.perf_counter() - started
    result = EvalResult(whole.perplexity, whole.mean, whole.tokens, len(examples), seconds)
    return result, [rows[number] for number in range(len(examples))]
