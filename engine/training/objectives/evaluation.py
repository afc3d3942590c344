"""The loss and figures of held-out answers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import torch

from engine.data.batches.sequences import AnswerSet
from engine.inference.perplexity import TOKENS_PER_BATCH, dealt_batches, grouped
from engine.training.objectives.objective import Objective
from kernels.runtime.ranks import ONE_RANK, Ranks
from models.decoder import Decoder
from models.layers.context import DEFAULT_SETTINGS, StepSettings


def indices_by_tokens(
    answers: AnswerSet, indices: Sequence[int], budget: int = TOKENS_PER_BATCH
) -> Iterator[list[int]]:
    """These examples, longest first, with at most `budget` tokens together; one at least."""
    longest_first = sorted(indices, key=lambda index: -answers.length(index))
    return grouped(longest_first, budget, answers.length)


@torch.no_grad()
def evaluate_answers(
    model: Decoder,
    objective: Objective,
    answers: AnswerSet,
    settings: StepSettings = DEFAULT_SETTINGS,
    tokens_per_batch: int = TOKENS_PER_BATCH,
    ranks: Ranks = ONE_RANK,
    indices: Sequence[int] | None = None,
) -> dict[str, float]:
    """`loss` and the objective's figures over all `answers`, as one step of all of them has them.

    With `indices` over these alone. Dropout is off, and the model's mode is left as it was. The
    batches are dealt to `ranks`, which all have the result.
    """
    was_training = model.training
    model.eval()
    chosen = range(len(answers.examples)) if indices is None else indices
    groups = indices_by_tokens(answers, chosen, tokens_per_batch)
    batches = list(dealt_batches([partial(answers.batch, group) for group in groups], ranks))
    totals = objective.totals(model, batches, settings, ranks)
    sums = torch.zeros(1 + len(objective.names), dtype=torch.float64, device=model.device)
    for batch in batches:
        part = objective.share(model, batch, settings, totals)
        sums[0] += part.loss
        if part.figures is not None:
            sums[1:] += part.figures
    model.train(was_training)
    for shared in (model.context_ranks, ranks):
        shared.all_reduce(sums).wait()
    return dict(zip(("loss", *objective.names), sums.tolist(), strict=True))
