"""Have a loaded model answer questions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from engine.config.tasks.gates import GateSettings
from engine.config.tasks.inference import Sampling
from engine.gates.rows import Question
from engine.inference.generation import complete
from engine.tokenization.tokenizer import Tokenizer
from models.decoder import Decoder


@dataclass(frozen=True)
class Answerer:
    """A model with all that answering takes.

    Attributes:
        stop_ids: ids that end an answer.
        kwargs: further variables of the chat template.
        sampling: penalties and the like; temperature and seed are the gates file's.
    """

    decoder: Decoder
    tokenizer: Tokenizer
    stop_ids: frozenset[int]
    kwargs: Mapping[str, Any]
    max_new_tokens: int

    def answer(self, question: Question, temperature: float = 0.0, seed: int = 0) -> str:
        """The model's answer: the likeliest tokens, or drawn ones."""
        text = self.tokenizer.chat_template.render(
            question.messages, tools=question.row.tools, add_generation_prompt=True, **self.kwargs
        )
        result = complete(
            self.decoder,
            self.tokenizer,
            self.tokenizer.encode(text, add_special_tokens=False),
            max_new_tokens=self.max_new_tokens,
            stop_ids=self.stop_ids,
            sampling=Sampling(temperature=temperature, seed=seed),
        )
        return result.text

    def answers(self, questions: Sequence[Question]) -> list[str]:
        """The likeliest answer to each."""
        return [self.answer(question) for question in questions]

    def programs(self, question: Question, gates: GateSettings, index: int) -> list[str]:
        """`gates.samples` drawn answers to the question with this index."""
        first = gates.seed + index * gates.samples
        return [
            self.answer(question, gates.temperature, first + number)
            for number in range(gates.samples)
        ]
