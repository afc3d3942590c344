"""Objectives over pairs of answers: dpo, ipo, simpo, cpo and orpo."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.training.objectives.answer_losses import (
    FIGURES,
    AnswerScores,
    LossSettings,
    cpo_loss,
    dpo_loss,
    ipo_loss,
    orpo_loss,
    simpo_loss,
)
from engine.training.objectives.objective import Share, StepTotals
from kernels.runtime.device import upload
from kernels.runtime.ranks import ONE_RANK, Ranks, host_sums
from models.decoder import Decoder
from models.layers.context import StepSettings
from models.layers.packed_batch import PackedBatch
from models.sequences import batch_log_probs, sequences_of

PairLoss = Callable[[AnswerScores, AnswerScores, LossSettings], Tensor]

PAIR_LOSSES: dict[str, PairLoss] = {
    "dpo": dpo_loss,
    "ipo": ipo_loss,
    "simpo": simpo_loss,
    "cpo": cpo_loss,
    "orpo": orpo_loss,
}
MEAN_REWARDS = ("simpo", "orpo")
"""Objectives whose implicit reward is of a token's mean log-probability."""


@dataclass(frozen=True)
class PairObjective:
    """A loss of pairs, averaged over the pairs of a step.

    `reference` (examples, 2) has the reference's log-probabilities of every example's chosen and
    rejected answer in host memory; None stands for an objective without a reference.
    `likelihood_weight` is that of the chosen answers' negative log-likelihood.
    """

    objective: str
    how: LossSettings
    likelihood_weight: float = 0.0
    reference: Tensor | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """Figures of a step, each a mean over its pairs."""
        names = FIGURES if self.reference is None else (*FIGURES, "kl")
        return (*names, "nll_loss") if self.likelihood_weight else names

    def totals(
        self,
        model: Decoder,
        batches: Sequence[PackedBatch],
        settings: StepSettings,
        ranks: Ranks = ONE_RANK,
    ) -> StepTotals:
        """The pairs, and the trained tokens of their chosen answers."""
        counts = [sequences_of(batch).counts for batch in batches]
        pairs, tokens = host_sums(
            ranks,
            sum(len(each) // 2 for each in counts),
            sum(sum(each[::2]) for each in counts),
        )
        if pairs == 0:
            raise ValueError("the step has no pair")
        return StepTotals(pairs, int(tokens))

    def share(
        self,
        model: Decoder,
        batch: PackedBatch,
        settings: StepSettings,
        totals: StepTotals,
        loss_scale: float = 1.0,
    ) -> Share:
        """The sum over the batch's pairs, divided by those of the step.

        Ranks that share the batch's tokens have equal parts of it.
        """
        sequences = sequences_of(batch)
        sums, balance = batch_log_probs(model, batch, settings)
        chosen, rejected = self._answers(sums, sequences.counts, sequences.examples)
        size = model.context_ranks.size
        share = 1.0 / (totals.items * size)
        loss = PAIR_LOSSES[self.objective](chosen, rejected, self.how).sum() * share
        likelihood = -chosen.policy.sum() / (totals.tokens * size)
        if self.likelihood_weight:
            loss = loss + self.likelihood_weight * likelihood
        if balance is not None:
            loss = loss + balance * (len(sequences.counts) // 2 * share)
        with torch.no_grad():
            figures = self._figures(chosen, rejected).sum(1) * share
            if self.likelihood_weight:
                figures = torch.cat((figures, likelihood.detach().unsqueeze(0)))
        return Share(loss * loss_scale, figures)

    def _answers(
        self, sums: Tensor, counts: Sequence[int], examples: Sequence[int]
    ) -> tuple[AnswerScores, AnswerScores]:
        pairs = sums.view(-1, 2)
        tokens = upload(torch.tensor(counts, dtype=torch.float32), sums.device).view(-1, 2)
        reference = torch.zeros_like(pairs)
        if self.reference is not None:
            values = self.reference[torch.tensor(examples[::2], dtype=torch.int64)]
            reference = upload(values, sums.device).to(pairs.dtype)
        chosen, rejected = (
            AnswerScores(pairs[:, side], reference[:, side], tokens[:, side].to(pairs.dtype))
            for side in (0, 1)
        )
        return chosen, rejected

    def _figures(self, chosen: AnswerScores, rejected: AnswerScores) -> Tensor:
        """The figures (F, P) of every pair but the likelihood, in the order of `names`."""
        mean = self.objective in MEAN_REWARDS
        good, bad = (
            self.how.beta * (answers.mean if mean else answers.ratio())
            for answers in (chosen, rejected)
        )
        rows = [good, bad, (good > bad).to(good.dtype), good - bad, chosen.policy, rejected.policy]
        if self.reference is not None:
            rows.append((chosen.ratio() + rejected.ratio()) / 2)
        return torch.stack(rows).detach()
