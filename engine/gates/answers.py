"""Have a loaded model answer questions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from engine.config.tasks.gates import GateSettings
from engine.config.tasks.inference import Sampling
from engine.gates.rows import Question
from engine.inference.batch_files import PromptJob, answer_in_order
from engine.inference.batched import BatchedGenerator
from engine.inference.request import RequestSettings
from engine.tokenization.tokenizer import Tokenizer
from models.decoder import Decoder


@dataclass(frozen=True)
class Answerer:
    """A model with all that answering takes.

    Attributes:
        stop_ids: ids that end an answer.
        kwargs: further variables of the chat template.
    """

    decoder: Decoder
    tokenizer: Tokenizer
    stop_ids: frozenset[int]
    kwargs: Mapping[str, Any]
    max_new_tokens: int

    def answers(self, questions: Sequence[Question]) -> list[str]:
        """The likeliest answer to each."""
        return self._answered(self._job(question, Sampling()) for question in questions)

    def programs(self, question: Question, gates: GateSettings, index: int) -> list[str]:
        """`gates.samples` drawn answers to the question with this index."""
        first = gates.seed + index * gates.samples
        return self._answered(
            self._job(question, Sampling(temperature=gates.temperature, seed=first + number))
            for number in range(gates.samples)
        )

    def _job(self, question: Question, sampling: Sampling) -> PromptJob:
        text = self.tokenizer.chat_template.render(
            question.messages, tools=question.row.tools, add_generation_prompt=True, **self.kwargs
        )
        ids = self.tokenizer.encode(text, add_special_tokens=False)
        return PromptJob(ids, RequestSettings(self.max_new_tokens, sampling, self.stop_ids))

    def _answered(self, jobs: Iterable[PromptJob]) -> list[str]:
        """The answers in the order of the jobs, which share every pass."""
        generator = BatchedGenerator(self.decoder, self.tokenizer)
        ahead = 2 * generator.slots
        return [result.text for result in answer_in_order(generator, iter(jobs), ahead)]
