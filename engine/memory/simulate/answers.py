"""Batches of whole answers, and their objective, for a simulated step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from engine.config.recipes.preference import ObjectiveSettings
from engine.data.batches.sequences import AnswerSet
from engine.training.objectives.choose import make_objective
from engine.training.objectives.objective import Objective
from models.layers.packed_batch import PackedBatch, Sequences


def planned_batch(lengths: Sequence[int], config: ObjectiveSettings) -> PackedBatch:
    """A batch of examples of these lengths, of whose answers every token is trained.

    A pair is divided into two sequences of one length; with a shared prompt a third of what it lays
    into the batch is the prompt, and a third each answer.
    """
    documents: list[int] = []
    prompts: list[int] = []
    for length in lengths:
        prompt = length // 3 if config.share_prompt and length >= 6 else 0
        first = (length - prompt) // config.sequences_per_example
        prompts.append(prompt)
        documents.append(length - first if config.learns_pairs else length)
        if config.learns_pairs:
            documents.append(first + prompt)
    ids = torch.zeros(sum(documents), dtype=torch.int64)
    labels = ids.clone()
    starts = torch.tensor([0, *documents]).cumsum(0)
    if config.share_prompt:
        for index, start in enumerate(starts[:-1].tolist()):
            labels[start : start + prompts[index // 2]] = -100
    batch = PackedBatch.of(ids, labels, starts)
    owners = [index for index in range(len(lengths)) for _ in range(config.sequences_per_example)]
    counts = _counts(batch)
    batch = replace(batch, sequences=Sequences.of(counts, owners))
    return batch.with_shared(prompts) if config.share_prompt else batch


def _counts(batch: PackedBatch) -> list[int]:
    """Trained tokens of every document."""
    bounds = torch.tensor(batch.bounds)
    return torch.searchsorted(batch.trained, bounds).diff().tolist()


@dataclass(frozen=True)
class PlannedAnswers(AnswerSet):
    """Judged answers of which only the batches are known, whose mismatched ones are as large."""

    batches: tuple[PackedBatch, ...] = ()

    def good(self, indices: Sequence[int]) -> list[bool]:
        """Every second one."""
        return [index % 2 == 0 for index in range(len(indices))]

    def mismatched(self, indices: Sequence[int]) -> PackedBatch:
        """The batch of these examples itself."""
        same = (b for b in self.batches if b.sequences and b.sequences.examples == tuple(indices))
        return next(same)


def planned_objective(config: ObjectiveSettings, batches: Sequence[PackedBatch]) -> Objective:
    """The run's objective, for a step of these batches; a teacher is left out."""
    examples = [index for b in batches if b.sequences for index in b.sequences.examples]
    count = 1 + max(examples, default=0)
    reference = torch.zeros(count, 2, dtype=torch.float64) if config.has_reference else None
    return make_objective(config, PlannedAnswers((), 0, batches=tuple(batches)), reference)
