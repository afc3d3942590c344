"""Requests for generated text, and the events of their tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from engine.config.tasks.inference import Sampling
from engine.inference.streaming import TextStream

if TYPE_CHECKING:
    from engine.tokenization.tokenizer import Tokenizer


@dataclass(frozen=True)
class RequestSettings:
    """How one prompt is continued.

    An answer ends after `max_new_tokens`, with an id of `stop_ids` (which it holds), or before one
    of the texts in `stop`. With `logprobs` N every token comes with its log-probability and those
    of the N likeliest ones, in nats, as the model gives them before anything in `sampling`; with
    `prompt_logprobs` those of the prompt come with the first token. `adapter` is the name of one
    that was added to the generator; None is the model alone.
    """

    max_new_tokens: int = 128
    sampling: Sampling = field(default_factory=Sampling)
    stop_ids: frozenset[int] = frozenset()
    stop: tuple[str, ...] = ()
    logprobs: int | None = None
    prompt_logprobs: bool = False
    adapter: str | None = None


@dataclass(frozen=True)
class TokenLogprobs:
    """The log-probability of a token, in nats, and (id, log-probability) of the likeliest ones."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class TokenEvent:
    """What a step made of one request.

    `token` is the new id, None where the request ended without one. `text` is what the answer's
    text grew by; a stop token or text is none of it. `finish_reason` is None while the request goes
    on, then "stop", "length", "cancelled", or "error", with what is wrong in `error`. `prompt` are
    the log-probabilities of the prompt's tokens from the second on, with the first token of a
    request that asked for them.
    """

    request: int
    token: int | None
    text: str = ""
    logprobs: TokenLogprobs | None = None
    finish_reason: str | None = None
    prompt: tuple[TokenLogprobs, ...] | None = None
    error: str | None = None


class Answer:
    """The ids and the text of one answer while it grows, and whether it has ended."""

    def __init__(self, tokenizer: Tokenizer | None, settings: RequestSettings) -> None:
        self.ids: list[int] = []
        self.finish_reason: str | None = None
        self._settings, self._tokenizer = settings, tokenizer
        self._stream: TextStream | None = None
        self._endings: list[list[int]] = []
        if tokenizer is not None:
            self._stream = TextStream(tokenizer.decode, settings.stop)
            self._endings = _with_special(settings.stop, tokenizer)

    def push(self, token: int) -> str:
        """Add an id; returns the text that is certain now, and sets `finish_reason` at the end."""
        ids, stream = self.ids, self._stream
        ids.append(token)
        if token in self._settings.stop_ids:
            return self._end("stop", ids[:-1])
        ending = next((e for e in self._endings if ids[-len(e) :] == e), None)
        if ending is not None:
            return self._end("stop", ids[: -len(ending)])
        piece = "" if stream is None else stream.push(token)
        if stream is not None and stream.stopped():
            self.finish_reason = "stop"
            return piece + stream.finish(stream.text)
        if len(ids) >= self._settings.max_new_tokens:
            return piece + self._end("length", ids)
        return piece

    def _end(self, reason: str, ids: Sequence[int]) -> str:
        """The rest of the text of `ids`, which are the answer."""
        self.finish_reason = reason
        if self._stream is None or self._tokenizer is None:
            return ""
        return self._stream.finish(self._tokenizer.decode(ids))


def _with_special(stop: Sequence[str], tokenizer: Tokenizer) -> list[list[int]]:
    """The ids of those stop strings that hold special tokens, which decoding leaves out."""
    encoded = [tokenizer.encode(mark, add_special_tokens=False) for mark in stop if mark]
    return [ids for ids in encoded if not tokenizer.special_ids.isdisjoint(ids)]


def logprobs_of(logits: Tensor, tokens: Sequence[int], top: int) -> tuple[TokenLogprobs, ...]:
    """Of logits (R, V), an id for each row and the `top` likeliest ones, the likeliest first."""
    scores = logits.float().log_softmax(-1)
    chosen = scores.gather(1, torch.tensor(tokens, device=scores.device)[:, None])[:, 0].tolist()
    best = scores.topk(min(top, scores.shape[1]), -1)
    return tuple(
        TokenLogprobs(token, logprob, tuple(zip(ids, values, strict=True)))
        for token, logprob, ids, values in zip(
            tokens, chosen, best.indices.tolist(), best.values.tolist(), strict=True
        )
    )
