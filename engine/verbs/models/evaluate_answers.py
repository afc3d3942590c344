"""engine eval --objective: how well a model tells better answers from worse.

The rewards are those that training by the objective has: with a reference, beta times how much
likelier an answer is to the model than to the reference, which is the model without its adapter
unless another is named; of orpo and simpo the answer's mean log-probability; of cpo its sum.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace

from engine.config.recipes.preference import ObjectiveSettings
from engine.config.spelling import given_chunk
from engine.config.tasks.inference import EvalSettings
from engine.data.batches.loader import split_heldout
from engine.data.batches.sequences import AnswerSet
from engine.data.dataset import RowChoice, read_chosen
from engine.data.examples import ExampleSettings, check_ids
from engine.data.preferences import answer_examples
from engine.data.rendering import Learning
from engine.errors import ConfigError, DataError
from engine.inference.loading import load_decoder
from engine.inference.parts import PartNames, categories_of, parts_of
from engine.model_sources.open import open_model_source
from engine.training.evaluation.heldout import HeldoutAnswers
from engine.training.objectives.choose import make_objective
from engine.training.objectives.reference import reference_log_probs
from engine.training.row_set import with_system
from engine.verbs.models.evaluate import LoadedModel, loaded
from models.decoder import Decoder
from models.layers.context import StepSettings


@dataclass(frozen=True)
class PreferenceResult:
    """The figures of an evaluation by the names that metrics.jsonl has, of so many rows."""

    figures: Mapping[str, float]
    rows: int
    seconds: float

    def text(self) -> str:
        """Accuracy, margin and loss, of all and of every part."""
        lines = [
            f"accuracy {self.figures['eval_rewards/accuracies']:.4f}   "
            f"margin {self.figures['eval_rewards/margins']:.4f}   "
            f"loss {self.figures['eval_loss']:.4f}"
        ]
        prefix = "eval_rewards/accuracies/"
        for name, value in self.figures.items():
            if name.startswith(prefix):
                part = name.removeprefix(prefix)
                loss = self.figures[f"eval_loss/{part}"]
                lines.append(f"  {part}: accuracy {value:.4f}, loss {loss:.4f}")
        return "\n".join([*lines, f"{self.rows:,} rows, {self.seconds:.1f} s"])


def evaluate_preferences(settings: EvalSettings) -> PreferenceResult:
    """The objective's loss, rewards and accuracy over the rows of `settings`.

    Raises `DataError` for rows that are no preferences, `ConfigError` where there is no reference,
    and as loading does.
    """
    asked = ObjectiveSettings(objective=settings.objective, beta=settings.beta)
    if asked.has_reference and settings.reference is None and not settings.adapter:
        raise ConfigError(
            f"--objective {settings.objective} measures answers against a reference, which is the "
            "model without its adapter, and no --adapter is given. Name one, or another model with "
            "--reference MODEL, or give --objective simpo, which needs none."
        )
    with loaded(settings) as model:
        started = time.perf_counter()
        answers, heldout_parts = _answers(model)
        how = StepSettings(
            loss_chunk_tokens=given_chunk(settings.loss_chunk_tokens),
            mlp_tile_tokens=settings.mlp_tile_tokens,
        )
        table = None
        if asked.has_reference:
            every = range(len(answers.examples))
            judged = settings.objective == "kto"
            table = reference_log_probs(_reference(model), answers, every, how, judged)
        objective = make_objective(asked, answers, table)
        evaluated = HeldoutAnswers(model.decoder, answers, objective, how, parts=heldout_parts)
        figures = evaluated.measured()
        return PreferenceResult(figures, len(answers.examples), time.perf_counter() - started)


def _answers(model: LoadedModel) -> tuple[AnswerSet, PartNames]:
    """The rows as answers, and the parts that they make."""
    settings, tokenizer = model.settings, model.tokenizer
    choice = replace(RowChoice.of(settings, settings.category), judged=settings.objective == "kto")
    rows = read_chosen(settings.data, choice)[0][: settings.limit_rows]
    if settings.heldout:
        rows = split_heldout(rows, settings.heldout, settings.seed)[1]
    rows = [with_system(row, settings.system_prompt) for row in rows]
    learning = Learning.of(settings)
    how = ExampleSettings(
        settings.max_length, settings.chat_template_kwargs, settings.bad_lines, learning
    )
    examples, _ = answer_examples(rows, tokenizer, how, settings.objective)
    if not examples:
        raise DataError(f"{', '.join(settings.data)}: no row is left to evaluate.")
    check_ids(examples, max(model.source.config.vocab_size, tokenizer.vocab_size))
    return AnswerSet(examples, settings.max_length), parts_of(examples, categories_of(rows))


def _reference(model: LoadedModel) -> Decoder:
    """What answers are measured against: the model without its adapter, or another one."""
    settings = model.settings
    if settings.reference is None:
        source, how = model.source, settings.model_copy(update={"adapter": ()})
    else:
        source = open_model_source(settings.reference)
        how = settings.model_copy(update={"adapter": (), "model": settings.reference})
    needed = model.tokenizer.vocab_size
    if source.config.vocab_size < needed:
        raise ConfigError(
            f"The reference {source.path} has a vocabulary of {source.config.vocab_size}, and the "
            f"adapter's tokenizer {needed} tokens. Name a --reference that has them, or give "
            "--objective simpo, which needs none."
        )
    return load_decoder(source, how, double_quant=settings.double_quant)
