"""Evaluate a run's held-out rows, for its metrics and its summary."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from engine.config.training.evaluation import EVAL, LOSS
from engine.data.examples import Example
from engine.inference.parts import PartNames
from engine.inference.perplexity import EvalResult, evaluate_examples
from models.decoder import Decoder
from models.layers.context import StepSettings

log = logging.getLogger(__name__)

PERPLEXITY = f"{EVAL}perplexity"
HELDOUT, BEFORE = "heldout_", "_before"
"""What the names of figures in a summary begin with, and end with before the first step."""


def evaluate_heldout(
    model: Decoder, heldout: Sequence[Example], parts: PartNames, settings: StepSettings
) -> EvalResult:
    """The loss of the run's held-out rows, of all together and of every part."""
    return evaluate_examples(model, heldout, settings=settings, parts=parts)


def figures_of(result: EvalResult) -> dict[str, float]:
    """The figures of an evaluation by the names that metrics.jsonl has."""
    parts = {f"{LOSS}/{name}": loss for name, loss in result.parts.items()}
    return {LOSS: result.loss, PERPLEXITY: result.perplexity} | parts


def log_figures(result: EvalResult) -> None:
    """Tell an evaluation while the run trains."""
    log.info("held-out loss %.4f, perplexity %.2f", result.loss, result.perplexity)
    if result.parts:
        told = ", ".join(f"{name} {loss:.4f}" for name, loss in result.parts.items())
        log.info("held-out loss by part: %s", told)


@dataclass(frozen=True)
class HeldoutRows:
    """The held-out rows of a run beside the model that is trained; all may be asked without any."""

    model: Decoder
    examples: Sequence[Example]
    parts: PartNames
    settings: StepSettings

    def evaluate(self) -> EvalResult:
        """The loss of the rows as the model is now."""
        return evaluate_heldout(self.model, self.examples, self.parts, self.settings)

    def figures(self) -> dict[str, float]:
        """The figures of an evaluation while the run trains, told in the log."""
        result = self.evaluate()
        log_figures(result)
        return figures_of(result)

    def before(self) -> dict[str, float]:
        """Figures for the summary before the first step; nothing without rows."""
        if not self.examples:
            return {}
        figures = figures_of(self.evaluate())
        log.info("held-out perplexity before training: %.3f", figures[PERPLEXITY])
        return {_told(name, BEFORE): value for name, value in figures.items()}

    def after(self, known: Mapping[str, float] | None = None) -> dict[str, float]:
        """Figures for the summary of the weights that are saved; nothing without rows.

        `known` are those of an evaluation of the same weights.
        """
        if not self.examples:
            return {}
        figures = known or figures_of(self.evaluate())
        log.info("held-out perplexity after training: %.3f", figures[PERPLEXITY])
        return {_told(name): value for name, value in figures.items()}


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


def figure_names(heldout: Sequence[Example], parts: PartNames) -> set[str]:
    """The names of the figures that evaluations of these rows will have."""
    parts_there = parts.names(heldout)
    return set() if not heldout else {LOSS, PERPLEXITY, *(f"{LOSS}/{name}" for name in parts_there)}
