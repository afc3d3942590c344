"""Evaluate a run's held-out rows, for its metrics and its summary."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from engine.config.recipes.preference import ObjectiveSettings
from engine.config.training.evaluation import EVAL, LOSS
from engine.data.batches.sequences import AnswerSet
from engine.data.examples import Example
from engine.inference.parts import PartNames
from engine.inference.perplexity import EvalResult, evaluate_examples
from engine.training.objectives.choose import names_of
from engine.training.objectives.evaluation import evaluate_answers
from engine.training.objectives.objective import Objective
from kernels.runtime.ranks import ONE_RANK, Ranks
from models.decoder import Decoder
from models.layers.context import StepSettings

log = logging.getLogger(__name__)

PERPLEXITY, ACCURACY = f"{EVAL}perplexity", f"{EVAL}rewards/accuracies"
OF_PARTS = (LOSS, ACCURACY)
"""Figures that every part of held-out preferences has."""
HELDOUT, BEFORE = "heldout_", "_before"
"""What the names of figures in a summary begin with, and end with before the first step."""


def figures_of(result: EvalResult) -> dict[str, float]:
    """The figures of an evaluation by the names that metrics.jsonl has."""
    parts = {f"{LOSS}/{name}": loss for name, loss in result.parts.items()}
    return {LOSS: result.loss, PERPLEXITY: result.perplexity} | parts


class Heldout(ABC):
    """What a run evaluates beside the model that is trained; all may be asked without any rows."""

    examples: Sequence[Example]

    @abstractmethod
    def measured(self) -> dict[str, float]:
        """The figures of the model as it is now, by the names that metrics.jsonl has."""

    @abstractmethod
    def tell(self, figures: Mapping[str, float], when: str) -> None:
        """Log what `figures` say, which were measured `when`: "before training" or after it."""

    def figures(self) -> dict[str, float]:
        """The figures of an evaluation while the run trains, told in the log."""
        figures = self.measured()
        self.tell(figures, "")
        return figures

    def before(self) -> dict[str, float]:
        """Figures for the summary before the first step; nothing without rows."""
        if not self.examples:
            return {}
        figures = self.measured()
        self.tell(figures, "before training")
        return {_told(name, BEFORE): value for name, value in figures.items()}

    def after(self, known: Mapping[str, float] | None = None) -> dict[str, float]:
        """Figures for the summary of the weights that are saved; nothing without rows.

        `known` are those of an evaluation of the same weights.
        """
        if not self.examples:
            return {}
        figures = known or self.measured()
        self.tell(figures, "after training")
        return {_told(name): value for name, value in figures.items()}


@dataclass(frozen=True)
class HeldoutRows(Heldout):
    """Held-out rows whose tokens are learnt: loss and perplexity, of all and of every part."""

    model: Decoder
    examples: Sequence[Example]
    parts: PartNames
    settings: StepSettings
    ranks: Ranks = ONE_RANK

    def measured(self) -> dict[str, float]:
        """Loss and perplexity."""
        result = evaluate_examples(
            self.model,
            self.examples,
            settings=self.settings,
            parts=self.parts,
            ranks=self.ranks,
        )
        return figures_of(result)

    def tell(self, figures: Mapping[str, float], when: str) -> None:
        """Perplexity at the ends of a run, and every loss on the way."""
        if when:
            log.info("held-out perplexity %s: %.3f", when, figures[PERPLEXITY])
            return
        log.info("held-out loss %.4f, perplexity %.2f", figures[LOSS], figures[PERPLEXITY])
        parts = {k.removeprefix(f"{LOSS}/"): v for k, v in figures.items() if "/" in k}
        if parts:
            told = ", ".join(f"{name} {loss:.4f}" for name, loss in parts.items())
            log.info("held-out loss by part: %s", told)


@dataclass(frozen=True)
class HeldoutAnswers(Heldout):
    """Held-out pairs or judged answers: the objective's loss, rewards and accuracy.

    Every part has its loss and accuracy, of an evaluation of its own: what a loss is divided by, or
    measured from, is that of the part's answers.
    """

    model: Decoder
    answers: AnswerSet
    objective: Objective
    settings: StepSettings
    ranks: Ranks = ONE_RANK
    parts: PartNames = field(default_factory=PartNames)

    @property
    def examples(self) -> Sequence[Example]:  # type: ignore[override]
        """The pairs or answers."""
        return self.answers.examples

    def measured(self) -> dict[str, float]:
        """Loss and the objective's figures; of every part loss and accuracy."""
        what = self.model, self.objective, self.answers, self.settings
        figures = evaluate_answers(*what, ranks=self.ranks)
        told = {f"{EVAL}{name}": value for name, value in figures.items()}
        for part, indices in self._members().items():
            own = evaluate_answers(*what, ranks=self.ranks, indices=indices)
            told |= {f"{name}/{part}": own[name.removeprefix(EVAL)] for name in OF_PARTS}
        return told

    def _members(self) -> dict[str, list[int]]:
        """The indices of the examples of every part."""
        members: dict[str, list[int]] = {}
        for index, example in enumerate(self.examples):
            for part in self.parts.of(example):
                members.setdefault(part, []).append(index)
        return members

    def tell(self, figures: Mapping[str, float], when: str) -> None:
        """Loss, accuracy and margin."""
        log.info(
            "held-out preferences%s: loss %.4f, accuracy %.3f, margin %.3f", f" {when}" if when
            else "", figures[LOSS], figures[ACCURACY], figures[f"{EVAL}rewards/margins"],
        )  # fmt: skip
        for part in self._members():
            log.info(
                "held-out preferences of %s: loss %.4f, accuracy %.3f",
                part, *(figures[f"{name}/{part}"] for name in OF_PARTS),
            )  # fmt: skip


def _told(name: str, ending: str = "") -> str:
    """A figure's name in a summary: `heldout_loss` is `eval_loss` of metrics.jsonl."""
    figure, slash, part = name.removeprefix(EVAL).partition("/")
    return f"{HELDOUT}{figure}{ending}{slash}{part}"


def told_before(record: Mapping[str, Any]) -> dict[str, Any]:
    """What a manifest has of the evaluation before the first step."""
    return {
        name: value
        for name, value in record.items()
        if name.startswith(HELDOUT) and name.partition("/")[0].endswith(BEFORE)
    }


def figures_before(told: Mapping[str, float]) -> dict[str, float]:
    """The figures of `Heldout.before` by the names that metrics.jsonl has."""
    figures = {}
    for name, value in told.items():
        figure, slash, part = name.removeprefix(HELDOUT).partition("/")
        figures[f"{EVAL}{figure.removesuffix(BEFORE)}{slash}{part}"] = value
    return figures


def figure_names(
    config: ObjectiveSettings, heldout: Sequence[Example], parts: PartNames
) -> set[str]:
    """The names of the figures that evaluations of these rows will have."""
    if not heldout:
        return set()
    if config.learns_answers:
        names = {LOSS, *(f"{EVAL}{name}" for name in names_of(config))}
        return names | {f"{name}/{part}" for part in parts.names(heldout) for name in OF_PARTS}
    return {LOSS, PERPLEXITY, *(f"{LOSS}/{name}" for name in parts.names(heldout))}
