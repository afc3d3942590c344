"""Losses of tokens: the next one, or a teacher's distribution.

    sft      L = -sum_i log p(y_i | x, y_<i) / n                     over the n trained tokens
    distill  L = sum_i KL(p_teacher(. | x, y_<i) || p(. | x, y_<i)) / n

Where tokens have weights, each term is multiplied by its own and n is their sum.

Sources: Radford et al. 2018; Hinton et al. 2015, arXiv 1503.02531, at temperature 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from engine.training.objectives.objective import Share, StepTotals
from kernels.runtime.ranks import ONE_RANK, Ranks, host_sums
from models.decoder import Decoder
from models.layers.context import StepSettings
from models.layers.packed_batch import PackedBatch


@dataclass(frozen=True)
class TokenObjective:
    """Cross-entropy of the next token; with a `teacher` its distribution is learnt instead."""

    teacher: Decoder | None = None
    names: tuple[str, ...] = ()

    def totals(
        self,
        model: Decoder,
        batches: Sequence[PackedBatch],
        settings: StepSettings,
        ranks: Ranks = ONE_RANK,
    ) -> StepTotals:
        """The trained tokens, or the sum of their weights. Raises `ValueError` without any."""
        items, trained = host_sums(
            ranks,
            sum(batch.items for batch in batches),
            sum(batch.trained_tokens for batch in batches),
        )
        if items == 0:
            raise ValueError("none of the step's rows has a trained token")
        return StepTotals(items, int(trained))

    def share(
        self,
        model: Decoder,
        batch: PackedBatch,
        settings: StepSettings,
        totals: StepTotals,
        loss_scale: float = 1.0,
    ) -> Share:
        """The sum over the batch's trained tokens, divided by those of the step."""
        return Share(
            model.batch_loss(
                batch,
                settings,
                num_items=totals.items,
                loss_scale=loss_scale,
                teacher=self.teacher,
            )
        )


TOKENS = TokenObjective()
"""The next token of a row."""
