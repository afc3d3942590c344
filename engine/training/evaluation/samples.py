"""Answer the same prompts while a run trains, into samples.jsonl.

A line holds the step, the row of the prompt, and the answer. Every prompt has a seed of its own,
the same at every step, so that answers differ by the weights alone. A run that goes on from a step
drops the lines after it and makes them anew.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.config.tasks.inference import GenerateSettings, Sampling
from engine.config.train_config import TrainConfig
from engine.errors import DataError, EngineError
from engine.inference.batch_files import (
    ANSWER_KEYS,
    PromptJob,
    answer_in_order,
    read_rows,
    row_ids,
    sampled,
)
from engine.inference.batched import BatchedGenerator, check_prompt
from engine.inference.generation import GenerateResult, stop_ids_of
from engine.inference.request import RequestSettings
from engine.inference.sampling import resolve_sampling
from engine.model_sources.interface.model_source import ModelDescription
from engine.storage.appended import AppendedLines
from engine.storage.safe_files import read_regular
from engine.storage.strict_json import loads
from engine.tokenization.tokenizer import Tokenizer
from kernels.runtime.ranks import ONE_RANK, Ranks
from models.cache.many_sequences import row_capacity
from models.config.model_config import ModelConfig
from models.decoder import Decoder

log = logging.getLogger(__name__)

SAMPLES = "samples.jsonl"
SLOTS = 8
"""Prompts that are answered at a time."""
_LONGEST_FILE = 1 << 32


@dataclass(frozen=True)
class SamplePrompts:
    """The prompts of a run, their ids, and how they are answered."""

    rows: Sequence[Mapping[str, Any]]
    ids: Sequence[Sequence[int]]
    request: RequestSettings

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt with its answer."""
        return max(map(len, self.ids)) + self.request.max_new_tokens


def sample_prompts(
    config: TrainConfig, source: ModelDescription, tokenizer: Tokenizer, model: ModelConfig
) -> SamplePrompts | None:
    """The prompts of `config.sample_prompts`, rendered and checked; None without them.

    Answers end where the model's files say, and where the run's rows teach it (`more_stops` of
    `SampleWriter`). Raises `DataError` for a row that is no prompt, `ConfigError` for one that does
    not fit the model.
    """
    if config.sample_prompts is None:
        return None
    rows = read_rows(config.sample_prompts)
    how = GenerateSettings(
        model=config.model,
        prompt="",
        system=config.system_prompt,
        chat_template_kwargs=config.chat_template_kwargs,
    )
    ids = []
    for number, row in enumerate(rows, start=1):
        try:
            ids.append(row_ids(row, how, tokenizer))
            check_prompt(model, ids[-1], config.sample_max_new_tokens)
        except EngineError as error:
            raise type(error)(f"{config.sample_prompts}, prompt {number}: {error}") from error
    given: dict[str, Any] = {"temperature": config.sample_temperature, "seed": config.seed}
    asked = Sampling(**{name: value for name, value in given.items() if value is not None})
    sampling, line = resolve_sampling(asked, source.generation_config, config.model)
    if line is not None:
        log.info("samples: %s", line)
    stops = stop_ids_of(source, tokenizer)
    return SamplePrompts(rows, ids, RequestSettings(config.sample_max_new_tokens, sampling, stops))


class PromptAnswers:
    """Answers the prompts of a run with its model as it is.

    `more_stops` are ids that end an answer beside those of the prompts' request. Answers share keys
    and values of at most `step_tokens` tokens, those of a training step, so that they need no more
    memory than it; one answer alone may need more. `ranks` have parts of the model: all of them ask
    at the same time.
    """

    def __init__(
        self,
        prompts: SamplePrompts,
        model: Decoder,
        tokenizer: Tokenizer,
        more_stops: Sequence[int] = (),
        step_tokens: int = 1 << 62,
        ranks: Ranks = ONE_RANK,
    ) -> None:
        self.prompts, self.model, self.tokenizer = prompts, model, tokenizer
        self._more_stops = frozenset(more_stops)
        self._cache_tokens = max(step_tokens, row_capacity(prompts.longest))
        self._ranks = ranks

    @property
    def together(self) -> bool:
        """Whether all processes must ask, for none has the whole model."""
        return self._ranks.size > 1

    def __call__(self, step: int) -> list[GenerateResult]:
        """The answers after `step`.

        Weights that give no numbers are told in the log and leave none.
        """
        request = self.prompts.request
        stops = request.stop_ids | self._more_stops
        base = RequestSettings(request.max_new_tokens, request.sampling, stops)
        training = self.model.training
        generator = BatchedGenerator(
            self.model,
            self.tokenizer,
            slots=SLOTS,
            cache_tokens=self._cache_tokens,
            ranks=self._ranks,
        )
        ids = enumerate(self.prompts.ids)
        jobs = (PromptJob(prompt, sampled(base, index)) for index, prompt in ids)
        try:
            return list(answer_in_order(generator, jobs, SLOTS))
        except DataError as error:
            log.warning("No samples after step %d: %s", step, error)
            return []
        finally:
            self.model.train(training)


class SampleWriter(AppendedLines):
    """Writes the answers of a run's model to `samples.jsonl`, cut back to `resume_step` first.

    Raises `CheckpointError` if the disk refuses.
    """

    def __init__(self, path: Path, answers: PromptAnswers, resume_step: int = 0) -> None:
        earlier = _lines_until(path, resume_step) if resume_step > 0 else []
        super().__init__(path, b"".join(line + b"\n" for line in earlier))
        self.answers = answers

    def write(self, step: int) -> list[dict[str, Any]]:
        """Answer every prompt with the weights after `step`; the lines that were written."""
        answers = self.answers(step)
        if not answers:
            return []
        lines = [
            {
                "step": step,
                **_asked(row),
                "response": answer.text,
                "finish_reason": answer.finish_reason,
                "completion_tokens": answer.completion_tokens,
            }
            for row, answer in zip(self.answers.prompts.rows, answers, strict=True)
        ]
        self.append("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
        log.info("%d samples after step %d: %s", len(lines), step, self.path)
        return lines


def as_texts(lines: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """Prompt and answer of each line as texts, for trackers."""
    return [(_prompt_text(line), str(line["response"])) for line in lines]


def _prompt_text(line: Mapping[str, Any]) -> str:
    messages = line.get("messages")
    if isinstance(messages, list):
        return "\n".join(f"{m.get('role')}: {m.get('content')}" for m in messages)
    return str(line.get("prompt"))


def _asked(row: Mapping[str, Any]) -> dict[str, Any]:
    """The row without what an answer's line says itself; its own answer is `expected`."""
    own = {key: value for key, value in row.items() if key not in ("step", *ANSWER_KEYS)}
    return own if row.get("response") is None else own | {"expected": row["response"]}


def _lines_until(path: Path, step: int) -> list[bytes]:
    """The lines of a file of samples up to a step; what is no such line is left out."""
    if not path.exists():
        return []
    lines = []
    for line in read_regular(path, _LONGEST_FILE).split(b"\n"):
        try:
            number = loads(line.decode()).get("step")
        except (ValueError, AttributeError):
            continue  # torn
        if type(number) is int and number <= step:
            lines.append(line)
    return lines
