"""The objective over answers that are good or bad: kto."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from engine.data.batches.sequences import AnswerSet
from engine.training.objectives.answer_losses import (
    FIGURES,
    AnswerScores,
    LossSettings,
    kto_loss,
)
from engine.training.objectives.objective import Share, StepTotals
from kernels.runtime.device import upload
from kernels.runtime.ranks import ONE_RANK, Ranks, host_sums
from models.decoder import Decoder
from models.layers.context import StepSettings
from models.layers.packed_batch import PackedBatch
from models.sequences import batch_log_probs, sequences_of


@dataclass(frozen=True)
class JudgedObjective:
    """KTO, averaged over the answers of a step.

    What rewards are measured from is estimated over all micro-batches of a step, by a forward pass
    without gradients over prompts with other prompts' answers. `reference` (examples, 2) has the
    reference's log-probabilities of every example, and of its prompt with the other answer.
    """

    answers: AnswerSet
    how: LossSettings
    desirable_weight: float
    undesirable_weight: float
    reference: Tensor
    names: tuple[str, ...] = (*FIGURES, "kl")

    def totals(
        self,
        model: Decoder,
        batches: Sequence[PackedBatch],
        settings: StepSettings,
        ranks: Ranks = ONE_RANK,
    ) -> StepTotals:
        """The answers of each kind, and the step's baseline. Raises `ValueError` without any."""
        indices = [sequences_of(batch).examples for batch in batches]
        good = [self.answers.good(each) for each in indices]
        items, wanted = host_sums(ranks, sum(map(len, good)), sum(map(sum, good)))
        if items == 0:
            raise ValueError("the step has no answer")
        total = torch.zeros((), dtype=torch.float64, device=model.device)
        quiet = replace(settings, router_loss=0.0, dropout_seed=None)
        with torch.no_grad():
            for each in indices:
                other = self.answers.mismatched(each) if each else PackedBatch.idle()
                sums, _ = batch_log_probs(model, other, quiet)
                total += (sums - self._reference(each, 1, sums)).sum()
        ranks.all_reduce(total).wait()
        baseline = (total / items).clamp(min=0.0)
        return StepTotals(items, 0, int(wanted), int(items - wanted), baseline)

    def share(
        self,
        model: Decoder,
        batch: PackedBatch,
        settings: StepSettings,
        totals: StepTotals,
        loss_scale: float = 1.0,
    ) -> Share:
        """The sum over the batch's answers, divided by those of the step.

        Ranks that share the batch's tokens have equal parts of it.
        """
        assert totals.baseline is not None
        sequences = sequences_of(batch)
        sums, balance = batch_log_probs(model, batch, settings)
        indices, size = sequences.examples, model.context_ranks.size
        share = 1.0 / (totals.items * size)
        known = torch.tensor(self.answers.good(indices), dtype=torch.bool)
        good = upload(known, sums.device)
        tokens = upload(torch.tensor(sequences.counts, dtype=torch.float32), sums.device)
        answers = AnswerScores(sums, self._reference(indices, 0, sums), tokens)
        baseline = totals.baseline.to(sums.dtype)
        weights = torch.where(good, self.desirable_weight, self.undesirable_weight)
        loss = (weights * kto_loss(answers, good, baseline, self.how)).sum() * share
        if balance is not None:
            loss = loss + balance * (len(indices) * share)
        with torch.no_grad():
            figures = self._figures(answers, good, baseline, totals) / size
        part = len(indices) * share
        return Share(loss * loss_scale, torch.cat((figures, (baseline * part).unsqueeze(0))))

    def _reference(self, indices: Sequence[int], column: int, like: Tensor) -> Tensor:
        values = self.reference[torch.tensor(indices, dtype=torch.int64), column]
        return upload(values, like.device).to(like.dtype)

    def _figures(
        self, answers: AnswerScores, good: Tensor, baseline: Tensor, totals: StepTotals
    ) -> Tensor:
        """The first figures of `names`: means over the good answers, the bad ones, or all."""
        rewards, wanted = self.how.beta * answers.ratio(), good.to(answers.policy.dtype)
        right = (rewards > self.how.beta * baseline) == good
        shares = [
            (values * kind).sum() / max(1, count)
            for values in (rewards, answers.policy)
            for kind, count in ((wanted, totals.wanted), (1.0 - wanted, totals.unwanted))
        ]
        accuracy = right.to(rewards.dtype).sum() / totals.items
        chosen, rejected, *log_probs = shares
        figures = [chosen, rejected, accuracy, chosen - rejected, *log_probs]
        return torch.stack(figures).detach()
