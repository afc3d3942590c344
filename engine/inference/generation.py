"""Answer one prompt, with text and ids as they come."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.config.tasks.inference import Sampling
from engine.errors import CheckpointError
from engine.inference.batched import BatchedGenerator
from engine.inference.request import RequestSettings, TokenEvent
from engine.model_sources.interface.stops import adapter_stops, stops_of
from models.decoder import Decoder

if TYPE_CHECKING:
    from engine.model_sources.interface.model_source import ModelDescription
    from engine.tokenization.tokenizer import Tokenizer


@dataclass(frozen=True)
class GenerateResult:
    """What came out: `finish_reason` is "stop" (a stop token or string) or "length".

    `sampling` says what of generation_config.json was used, if anything.
    """

    text: str
    prompt_tokens: int
    completion_tokens: int
    finish_reason: str
    tokens_per_second: float
    sampling: str | None = None


def generate_ids(
    model: Decoder,
    prompt: Sequence[int],
    *,
    max_new_tokens: int,
    stop_ids: frozenset[int] = frozenset(),
    sampling: Sampling | None = None,
) -> Iterator[int]:
    """Yield new ids, the stop token included, until one is in `stop_ids` or the limit is reached.

    Raises `ConfigError` for a prompt that is empty or not of the model's vocabulary.
    """
    settings = RequestSettings(max_new_tokens, sampling or Sampling(), stop_ids)
    for event in answer_events(BatchedGenerator(model, slots=1), prompt, settings):
        assert event.token is not None
        yield event.token


def answer_events(
    generator: BatchedGenerator, prompt: Sequence[int], settings: RequestSettings
) -> Iterator[TokenEvent]:
    """The events of one request, the only one of its generator.

    Raises `ConfigError` for a prompt that cannot be used, `CheckpointError` for logits that are not
    numbers.
    """
    generator.submit(prompt, settings)
    while generator.active or generator.waiting:
        for event in generator.step():
            if event.error is not None:
                raise CheckpointError(event.error)
            yield event


def stop_ids_of(source: ModelDescription, tokenizer: Tokenizer, *adapters: Path) -> frozenset[int]:
    """Ids that end an answer, by generation_config.json, config.json, tokenizer and adapters."""
    ids = {*stops_of(source), *(stop for path in adapters for stop in adapter_stops(path))}
    if tokenizer.eos_token_id is not None:
        ids.add(tokenizer.eos_token_id)
    return frozenset(ids)


def complete(
    model: Decoder,
    tokenizer: Tokenizer,
    prompt_ids: Sequence[int],
    *,
    max_new_tokens: int,
    stop_ids: frozenset[int],
    stop: Sequence[str] = (),
    sampling: Sampling | None = None,
    on_text: Callable[[str], None] | None = None,
) -> GenerateResult:
    """Generate and decode, ending before the first of the strings in `stop`.

    `on_text` takes every new piece of the answer; together they are its text.
    """
    started, pieces, tokens, reason = time.perf_counter(), list[str](), 0, "length"
    settings = RequestSettings(max_new_tokens, sampling or Sampling(), stop_ids, tuple(stop))
    for event in answer_events(BatchedGenerator(model, tokenizer, slots=1), prompt_ids, settings):
        tokens += 1
        if event.text:
            pieces.append(event.text)
            if on_text is not None:
                on_text(event.text)
        reason = event.finish_reason or reason
    seconds = max(time.perf_counter() - started, 1e-9)
    return GenerateResult("".join(pieces), len(prompt_ids), tokens, reason, tokens / seconds)


def prompt_ids(
    tokenizer: Tokenizer,
    prompt: str,
    system: str | None = None,
    raw: bool = False,
    template_kwargs: Mapping[str, Any] | None = None,
) -> list[int]:
    """The ids a model is asked to continue: the chat template's, or those of the bare text."""
    if raw:
        return tokenizer.encode(prompt)
    messages = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": prompt})
    return conversation_ids(tokenizer, messages, template_kwargs)


def conversation_ids(
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, Any]],
    template_kwargs: Mapping[str, Any] | None = None,
) -> list[int]:
    """The ids of a conversation up to the beginning of the next answer."""
    text = tokenizer.chat_template.render(
        messages, add_generation_prompt=True, **(template_kwargs or {})
    )
    return tokenizer.encode(text, add_special_tokens=False)
