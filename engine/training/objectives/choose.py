"""The objective that a run's settings ask for."""

from __future__ import annotations

import torch
from torch import Tensor

from engine.config.recipes.preference import ObjectiveSettings
from engine.data.batches.sequences import AnswerSet
from engine.training.objectives.answer_losses import LossSettings
from engine.training.objectives.judged import JudgedObjective
from engine.training.objectives.objective import Objective
from engine.training.objectives.pairs import PairObjective
from engine.training.objectives.tokens import TokenObjective
from models.decoder import Decoder


def make_objective(
    config: ObjectiveSettings,
    answers: AnswerSet,
    reference: Tensor | None = None,
    teacher: Decoder | None = None,
) -> Objective:
    """What steps over `answers` minimise; of token objectives these are not looked at.

    `reference` (examples, 2) is what `engine.training.objectives.reference` measures of them, and
    `teacher` whose distribution is learnt.
    """
    if not config.learns_answers:
        return TokenObjective(teacher)
    how = LossSettings(
        config.chosen_beta, config.label_smoothing, config.margin, config.normalises_lengths
    )
    if config.learns_pairs:
        return PairObjective(config.objective, how, config.likelihood_weight, reference)
    if reference is None:
        raise ValueError("kto measures answers against a reference, and there is none")
    weights = config.desirable_weight, config.undesirable_weight
    return JudgedObjective(answers, how, *weights, reference)


def names_of(config: ObjectiveSettings) -> tuple[str, ...]:
    """Names of the figures that the objective reports."""
    reference = torch.zeros(0, 2) if config.has_reference else None
    return make_objective(config, AnswerSet((), 0), reference).names
