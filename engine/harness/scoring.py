"""Log-likelihoods of continuations, batched by length in packed rows.

A request is a context and a continuation, both ids. The model reads what precedes each token of the
continuation, at most `window` tokens of it; what is longer loses its beginning. Requests whose
inputs are equal, such as the one-letter choices of a question, share one pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from models.decoder import Decoder
from models.layers.packed_batch import PackedBatch

TOKENS_PER_BATCH = 2048
_LOGITS = 1 << 24
"""Logits that are in memory at a time, in fp32."""

Pair = tuple[Sequence[int], Sequence[int]]


@dataclass
class _Input:
    """Ids that the model reads, and the continuations asked for at their end, by request."""

    ids: tuple[int, ...]
    continuations: list[tuple[int, Sequence[int]]] = field(default_factory=list)


@torch.no_grad()
def score_pairs(
    model: Decoder, pairs: Sequence[Pair], window: int, tokens: int = TOKENS_PER_BATCH
) -> list[tuple[float, bool]]:
    """(log-likelihood in nats, whether every token is the likeliest) of each continuation.

    Raises `ValueError` for a context or continuation without tokens, or a continuation that is
    longer than `window`.
    """
    inputs: dict[tuple[int, ...], _Input] = {}
    for number, (context, continuation) in enumerate(pairs):
        if not context or not 0 < len(continuation) <= window:
            raise ValueError(
                f"a context of {len(context)} tokens and a continuation of {len(continuation)}; "
                f"expected at least one each, and at most {window} of the latter"
            )
        ids = tuple([*context, *continuation][-(window + 1) : -1])
        inputs.setdefault(ids, _Input(ids)).continuations.append((number, continuation))
    model.eval()
    sums = torch.zeros(len(pairs), dtype=torch.float64)
    greedy = torch.ones(len(pairs), dtype=torch.bool)
    for group in _by_length(list(inputs.values()), tokens):
        _score(model, group, sums, greedy)
    return list(zip(sums.tolist(), greedy.tolist(), strict=True))


def _by_length(inputs: list[_Input], tokens: int) -> Iterator[list[_Input]]:
    """Groups of at most `tokens` tokens, the longest inputs first."""
    group, size = list[_Input](), 0
    for one in sorted(inputs, key=lambda i: (-len(i.ids), i.ids)):
        if group and size + len(one.ids) > tokens:
            yield group
            group, size = [], 0
        group.append(one)
        size += len(one.ids)
    if group:
        yield group


def _score(model: Decoder, group: list[_Input], sums: Tensor, greedy: Tensor) -> None:
    """Add what every token of the continuations of one batch has to its request."""
    bounds, rows, targets, requests = [0], list[int](), list[int](), list[int]()
    for one in group:
        bounds.append(bounds[-1] + len(one.ids))
        for number, continuation in one.continuations:
            rows += range(bounds[-1] - len(continuation), bounds[-1])
            targets += continuation
            requests += [number] * len(continuation)
    ids = torch.tensor([token for one in group for token in one.ids])
    batch = PackedBatch.of(ids, cu_seqlens=torch.tensor(bounds))
    states = model.hidden_states(batch.to(model.device, model.ids_device))
    wanted, request = torch.tensor(targets), torch.tensor(requests)
    step = max(1, _LOGITS // model.config.vocab_size)
    for first in range(0, len(rows), step):
        part = slice(first, first + step)
        at = torch.tensor(rows[part], device=states.device)
        scores = model.logits(states.index_select(0, at)).float()
        target = wanted[part].to(scores.device)
        likely = scores.gather(1, target.unsqueeze(1)).squeeze(1) - scores.logsumexp(1)
        sums.index_add_(0, request[part], likely.double().cpu())
        missed = request[part][(scores.argmax(1) != target).cpu()]
        greedy[missed] = False
