"""Continuous batching: many requests share every forward pass of one model.

Requests join and leave between steps. A step takes one token of every running request and the next
part of prompts that are still read, all in one pass, so that a long prompt does not hold the others
up. A request sees nothing of the others: its keys are its own, its draws come from a generator of
its own, and its tokens are those that it gets alone.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from engine.errors import CheckpointError, ConfigError, listing
from engine.inference.loading import GivenAdapter, load_named_adapter
from engine.inference.next_token import next_token
from engine.inference.request import (
    Answer,
    RequestSettings,
    TokenEvent,
    TokenLogprobs,
    logprobs_of,
)
from engine.model_sources.interface.model_source import ModelSource
from engine.tokenization.tokenizer import Tokenizer
from kernels.runtime.ranks import ONE_RANK, Ranks
from models.cache.many_sequences import BatchCache, BatchPass, CachedSequence, row_capacity
from models.cache.one_sequence import KVCache
from models.config.model_config import ModelConfig
from models.decoder import Decoder
from models.layers.linear import RowGroups

PROMPT_TOKENS = 512
"""Tokens of prompts that one step reads."""


@dataclass(eq=False)
class _Request:
    """A request from `submit` to its last event.

    `cache` exists while the prompt is read, `sequence` afterwards; `last` is the token that the
    next pass reads.
    """

    number: int
    prompt: list[int]
    settings: RequestSettings
    answer: Answer
    generator: torch.Generator
    cache: KVCache | None = None
    sequence: CachedSequence | None = None
    read: list[TokenLogprobs] = field(default_factory=list)

    @property
    def reserved(self) -> int:
        """Tokens of the largest row that it can come to need."""
        return row_capacity(len(self.prompt) + self.settings.max_new_tokens)


class BatchedGenerator:
    """Generate for many requests at once.

    Not safe for threads: `submit`, `step` and `cancel` belong to one thread, or behind one lock.
    """

    def __init__(
        self,
        model: Decoder,
        tokenizer: Tokenizer | None = None,
        *,
        slots: int = 8,
        cache_tokens: int | None = None,
        prompt_tokens: int = PROMPT_TOKENS,
        ranks: Ranks = ONE_RANK,
    ) -> None:
        """Prepare for at most `slots` requests at a time; the others wait for their turn.

        Args:
            model: the model; adapters that it carries hold for every request.
            tokenizer: makes the text of answers, and finds stop texts; without it there is none.
            slots: requests that run at a time.
            cache_tokens: tokens of keys and values that running requests may reserve together, each
                the next power of two above its prompt and longest answer; None sets no limit.
            prompt_tokens: tokens of prompts that one step reads.
            ranks: who has parts of the model and is given the same requests; all draw from the
                logits of the first, so that they run the same passes.
        """
        if slots < 1 or prompt_tokens < 1:
            raise ConfigError(f"{slots} slots, {prompt_tokens} prompt tokens: at least 1 of each")
        self.model, self.tokenizer = model.eval(), tokenizer
        self.slots, self.cache_tokens, self.prompt_tokens = slots, cache_tokens, prompt_tokens
        self._ranks = ranks
        self._cache = BatchCache(model.config, model.dtype, model.device)
        self._waiting: deque[_Request] = deque()
        self._reading: list[_Request] = []
        self._running: dict[CachedSequence, _Request] = {}
        self._numbers = 0
        self._adapters: set[str] = set()
        self.beside: dict[str, BatchedGenerator] = {}
        self._theirs: dict[tuple[str, int], int] = {}

    def add_adapter(self, name: str, adapter: GivenAdapter, source: ModelSource) -> frozenset[int]:
        """Offer a saved adapter to requests that name it; the model was built from `source`.

        One that changes more than low-rank pairs is a model of its own, whose requests have passes
        of their own. Returns the ids that end an answer besides those of the model. Raises as
        `load_named_adapter`, and `ConfigError` for a name that is taken.
        """
        if name in self._adapters:
            raise ConfigError(f"there is an adapter named {name!r} already; give another name")
        stops, own = load_named_adapter(self.model, source, name, adapter)
        if own is not None:
            self.beside[name] = BatchedGenerator(
                own,
                self.tokenizer,
                slots=self.slots,
                cache_tokens=self.cache_tokens,
                prompt_tokens=self.prompt_tokens,
            )
        self._adapters.add(name)
        return stops

    @property
    def adapters(self) -> frozenset[str]:
        """Names of the adapters that requests may ask for."""
        return frozenset(self._adapters)

    @property
    def active(self) -> int:
        """Requests that have a slot."""
        others = sum(other.active for other in self.beside.values())
        return len(self._reading) + len(self._running) + others

    @property
    def waiting(self) -> int:
        """Requests that wait for a slot, or for memory."""
        return len(self._waiting) + sum(other.waiting for other in self.beside.values())

    @property
    def free_slots(self) -> int:
        """Slots that no request has."""
        return max(0, self.slots - self.active)

    @property
    def reserved_tokens(self) -> int:
        """Tokens of keys and values that the active requests may come to need."""
        others = sum(other.reserved_tokens for other in self.beside.values())
        return others + sum(r.reserved for r in (*self._reading, *self._running.values()))

    def submit(self, prompt: Sequence[int], settings: RequestSettings | None = None) -> int:
        """Queue a prompt; returns the number that its events carry.

        Raises `ConfigError` for a prompt that is empty or not of the model's vocabulary, and for a
        request that could never run.
        """
        settings = settings or RequestSettings()
        other = self.beside.get(settings.adapter or "")
        if other is not None and settings.adapter is not None:
            number = other.submit(prompt, replace(settings, adapter=None))
            self._theirs[settings.adapter, number] = self._numbers
            self._numbers += 1
            return self._numbers - 1
        settings = within_context(self.model.config, prompt, settings)
        check_prompt(self.model.config, prompt, settings.max_new_tokens)
        if settings.stop and self.tokenizer is None:
            raise ConfigError("stop texts need a tokenizer, and this generator has none")
        if settings.adapter is not None and settings.adapter not in self._adapters:
            raise ConfigError(
                f"there is no adapter named {settings.adapter!r}; there are "
                f"{listing(sorted(self._adapters)) or 'none'}"
            )
        generator = torch.Generator().manual_seed(settings.sampling.seed)
        answer = Answer(self.tokenizer, settings)
        request = _Request(self._numbers, list(prompt), settings, answer, generator)
        if self.cache_tokens is not None and request.reserved > self.cache_tokens:
            raise ConfigError(
                f"a prompt of {len(prompt)} tokens with {settings.max_new_tokens} new ones may "
                f"need a cache for {request.reserved} tokens, and {self.cache_tokens} are allowed; "
                "ask for a shorter answer, or give a shorter prompt"
            )
        self._numbers += 1
        self._waiting.append(request)
        return request.number

    def cancel(self, number: int) -> bool:
        """End a request and free what it has, without another event; False if it has ended."""
        for (name, theirs), own in self._theirs.items():
            if own == number:
                del self._theirs[name, theirs]
                return self.beside[name].cancel(theirs)
        for queue in (self._waiting, self._reading):
            for request in queue:
                if request.number == number:
                    queue.remove(request)
                    return True
        for sequence, request in self._running.items():
            if request.number == number:
                self._leave(sequence)
                return True
        return False

    def step(self) -> list[TokenEvent]:
        """One forward pass of each model; what it made of every request that got a token.

        Empty where there is nothing to do, or where only parts of prompts were read.
        """
        events = self._step()
        for name, other in self.beside.items():
            for event in other.step():
                key = name, event.request
                events.append(replace(event, request=self._theirs[key]))
                if event.finish_reason is not None:
                    del self._theirs[key]
        return events

    def _step(self) -> list[TokenEvent]:
        self._admit()
        self._cache.make_space()
        running = [self._running[sequence] for sequence in self._cache.running()]
        parts = self._parts()
        if not running and not parts:
            return []
        run = BatchPass(self._cache.bands(), [(cache, tokens) for _, cache, tokens in parts])
        ids = [request.answer.ids[-1] for request in running]
        rows, owners = list(range(len(ids))), [request.settings.adapter for request in running]
        for request, cache, part in parts:
            start, end = len(ids), len(ids) + part
            ids += request.prompt[cache.length : cache.length + part]
            owners += [request.settings.adapter] * part
            rows += range(start if request.settings.prompt_logprobs else end - 1, end)
        tokens = torch.tensor(ids, device=self.model.ids_device)
        groups = _row_groups(owners, self.model.device)
        logits = self.model.decode_batch(tokens, run, rows, groups)
        if self._ranks.size > 1:
            logits = logits.contiguous()
            self._ranks.broadcast(logits, 0).wait()
        return self._events(running, [(request, tokens) for request, _, tokens in parts], logits)

    def run(self) -> dict[int, list[TokenEvent]]:
        """Step until every request has ended; their events by number."""
        events: dict[int, list[TokenEvent]] = {}
        while self.active or self.waiting:
            for event in self.step():
                events.setdefault(event.request, []).append(event)
        return events

    def _admit(self) -> None:
        """Give free slots to those that wait, in their order, as far as memory goes."""
        limit, reserved = self.cache_tokens, self.reserved_tokens
        while self._waiting and self.free_slots:
            request = self._waiting[0]
            reserved += request.reserved
            if limit is not None and reserved > limit:
                return
            self._waiting.popleft()
            self._reading.append(request)

    def _parts(self) -> list[tuple[_Request, KVCache, int]]:
        """Which prompts this step reads, and how many tokens of each: the earliest first."""
        parts, left = list[tuple[_Request, KVCache, int]](), self.prompt_tokens
        for request in self._reading:
            if left == 0:
                break
            if request.cache is None:
                model, length = self.model, len(request.prompt)
                request.cache = KVCache(model.config, length, model.dtype, model.device)
            tokens = min(left, len(request.prompt) - request.cache.length)
            parts.append((request, request.cache, tokens))
            left -= tokens
        return parts

    def _events(
        self, running: list[_Request], parts: list[tuple[_Request, int]], logits: Tensor
    ) -> list[TokenEvent]:
        """Events of one pass, whose logits are those of the running requests, then of `parts`."""
        events = [self._grown(request, logits[row]) for row, request in enumerate(running)]
        row = len(running)
        for request, tokens in parts:
            cache = request.cache
            assert cache is not None
            rows = tokens if request.settings.prompt_logprobs else 1
            own, row = logits[row : row + rows], row + rows
            if request.settings.prompt_logprobs:
                _note_prompt(request, cache.length - tokens, own)
            if cache.length == len(request.prompt):
                self._reading.remove(request)
                request.sequence, request.cache = self._cache.join(cache), None
                self._running[request.sequence] = request
                events.append(self._grown(request, own[-1]))
        return events

    def _grown(self, request: _Request, logits: Tensor) -> TokenEvent:
        """Draw the next token of a request from logits (V,); one that has ended leaves."""
        settings, answer = request.settings, request.answer
        first = settings.prompt_logprobs and not answer.ids
        prompt = tuple(request.read) if first else None
        try:
            token = next_token(
                logits,
                request.prompt,
                settings.sampling,
                request.generator,
                made=answer.ids,
                stop_ids=settings.stop_ids,
            )
        except CheckpointError as error:
            assert request.sequence is not None
            self._leave(request.sequence)
            return TokenEvent(request.number, None, "", None, "error", prompt, str(error))
        logprobs = None
        if settings.logprobs is not None:
            (logprobs,) = logprobs_of(logits[None], [token], settings.logprobs)
        text = answer.push(token)
        if answer.finish_reason is not None:
            assert request.sequence is not None
            self._leave(request.sequence)
        reason = answer.finish_reason
        return TokenEvent(request.number, token, text, logprobs, reason, prompt)

    def _leave(self, sequence: CachedSequence) -> None:
        del self._running[sequence]
        self._cache.leave(sequence)


def _row_groups(owners: Sequence[str | None], device: torch.device) -> RowGroups | None:
    """Which tokens of a pass are computed with which adapter, given the adapter of each."""
    names = set(owners) - {None}
    if not names:
        return None
    if len(set(owners)) == 1:
        return RowGroups({name: None for name in names if name is not None}, len(owners))
    rows = {
        name: torch.tensor([i for i, owner in enumerate(owners) if owner == name], device=device)
        for name in names
        if name is not None
    }
    return RowGroups(rows, len(owners))


def _note_prompt(request: _Request, start: int, logits: Tensor) -> None:
    """Keep what logits (T, V) of the prompt's tokens from `start` on say of those after them."""
    following = request.prompt[start + 1 : start + 1 + logits.shape[0]]
    if following:
        top = request.settings.logprobs or 0
        request.read += logprobs_of(logits[: len(following)], following, top)


def within_context(
    config: ModelConfig, prompt: Sequence[int], settings: RequestSettings
) -> RequestSettings:
    """`settings` with an answer that ends where the model's context does.

    A prompt that is longer than the context may get an answer of the context's length.
    """
    context = config.max_position_embeddings
    left = context - len(prompt) if len(prompt) < context else context
    return replace(settings, max_new_tokens=min(settings.max_new_tokens, left))


def check_prompt(config: ModelConfig, prompt: Sequence[int], max_new_tokens: int) -> None:
    """Raises `ConfigError` for a prompt that is empty or not of the vocabulary, or too long."""
    if not prompt:
        raise ConfigError("the prompt has no tokens; give at least one character")
    if max(prompt) >= config.vocab_size:
        raise ConfigError(
            f"the prompt has the token id {max(prompt)}, and the model's vocabulary ends at "
            f"{config.vocab_size - 1}: its tokenizer is that of another model, or of this "
            "one with tokens added whose rows its embedding never got. Take the tokenizer files "
            "that belong to the weights."
        )
    if min(prompt) < 0:
        raise ConfigError(f"the prompt has the token id {min(prompt)}; ids begin at 0")
    if max_new_tokens < 1:
        raise ConfigError(f"{max_new_tokens} new tokens were asked for; at least 1 is made")
    rope, tokens = config.rope_parameters, len(prompt) + max_new_tokens
    longest = rope.get("original_max_position_embeddings", tokens)
    if rope["rope_type"] == "dynamic" and tokens > longest:
        raise ConfigError(
            f"the prompt and its answer may have {tokens} tokens, and past {longest} this model's "
            "dynamic rotary scaling turns every position anew with each token, which a cache of "
            "keys cannot follow; ask for a shorter answer, or give a shorter prompt"
        )
