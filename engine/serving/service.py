"""The models of a server, and answers to requests."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from engine.config.tasks.inference import Sampling
from engine.conversation.prompts import Prompt, conversation_prompt
from engine.conversation.reasoning import reasons
from engine.conversation.tool_calls import forced_call
from engine.errors import ConfigError, DataError
from engine.inference.request import RequestSettings
from engine.inference.sampling import resolve_sampling
from engine.serving.metrics import Metrics
from engine.serving.model_thread import AnswerJob, ModelThread, ScoredPrompt
from engine.serving.openai.answers import AnswerPiece, AnswerPieces, TokenTexts
from engine.serving.openai.api_errors import ApiError, Notes, wrong
from engine.serving.openai.decoding import Decoding
from engine.serving.openai.requests import ChatRequest, CompletionRequest
from engine.tokenization.tokenizer import Tokenizer


@dataclass(frozen=True)
class ServedModel:
    """A name that requests may ask for: the base model, or one of its adapters."""

    name: str
    adapter: str | None
    stop_ids: frozenset[int]


@dataclass(frozen=True)
class Bounds:
    """What one request may ask for, in tokens and seconds."""

    context: int
    answer: int
    seconds: float


@dataclass(frozen=True)
class Loaded:
    """What the service needs of a loaded model, apart from the weights."""

    tokenizer: Tokenizer
    vocabulary: int
    models: Sequence[ServedModel]
    generation_config: Mapping[str, Any] = field(default_factory=dict)
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)


Item = tuple[int, AnswerPiece | ScoredPrompt | ApiError]


class Answers:
    """The answers of one request while they are made.

    `prompt_tokens` are those of all its prompts. Closing frees what has not ended.
    """

    def __init__(self, service: Service, count: int, prompt_tokens: int) -> None:
        self._service, self._open = service, set(range(count))
        self._items: asyncio.Queue[Item] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()
        self._arrived, self._first = time.monotonic(), True
        self.jobs: list[AnswerJob] = []
        self.prompt_tokens, self.completion_tokens = prompt_tokens, 0

    def post(self, index: int, item: AnswerPiece | ScoredPrompt | ApiError) -> None:
        """Take what the model's thread brings forth for one of the answers."""
        try:
            self._loop.call_soon_threadsafe(self._items.put_nowait, (index, item))
        except RuntimeError:
            return  # The server's loop has ended, and nobody listens any more.

    async def pieces(self) -> AsyncIterator[tuple[int, AnswerPiece | ScoredPrompt]]:
        """(number of the answer, piece) as they come. Raises `ApiError`."""
        metrics = self._service.metrics
        while self._open:
            index, item = await self._items.get()
            if isinstance(item, ApiError):
                self._open.discard(index)
                metrics.count(metrics.finished, item.code or "error")
                raise item
            if self._first:
                self._first = False
                metrics.observe(metrics.first_token, time.monotonic() - self._arrived)
            if isinstance(item, AnswerPiece) and item.finish is not None:
                self._open.discard(index)
                self.completion_tokens += item.completion_tokens
                metrics.count(metrics.finished, item.finish)
                metrics.count(metrics.tokens, by=item.completion_tokens)
            yield index, item
        metrics.observe(metrics.duration, time.monotonic() - self._arrived)

    def usage(self) -> dict[str, int]:
        """Tokens so far, as OpenAI's interface has them."""
        prompt, completion = self.prompt_tokens, self.completion_tokens
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
        }

    def close(self) -> None:
        """Give up the answers that have not ended."""
        if self._open and self.jobs:
            metrics = self._service.metrics
            metrics.count(metrics.finished, "abandoned", by=len(self._open))
            self._service.thread.leave([self.jobs[index] for index in self._open])
            self._open = set()


class Service:
    """The models of a server, and the thread that runs them."""

    def __init__(self, loaded: Loaded, thread: ModelThread, bounds: Bounds) -> None:
        self.tokenizer, self.bounds, self.thread = loaded.tokenizer, bounds, thread
        self.models = {model.name: model for model in loaded.models}
        self.texts = TokenTexts(loaded.tokenizer)
        self.metrics = Metrics()
        self.created = int(time.time())
        self._loaded = loaded
        self._sources = "".join(self.tokenizer.chat_template.sources)
        self.reasons = reasons(self._sources)
        for name, text, read in (
            ("engine_running_answers", "Answers that have a slot.", lambda: thread.running),
            ("engine_waiting_answers", "Answers that wait for a slot.", lambda: thread.waiting),
            ("engine_healthy", "1 while the model runs.", lambda: int(thread.alive)),
        ):
            self.metrics.gauge(name, text, read)

    def model(self, name: str | None) -> ServedModel:
        """The model of a name; the base for none. Raises `ApiError` 404."""
        if name is None:
            return next(iter(self.models.values()))
        if name not in self.models:
            raise ApiError(
                404,
                f"there is no model {name[:200]!r} here; there are {', '.join(self.models)}",
                param="model",
                code="model_not_found",
            )
        return self.models[name]

    def chat_prompt(self, request: ChatRequest, notes: Notes) -> tuple[Prompt, str]:
        """The prompt of a chat, and the beginning of the answer that is part of it."""
        choice, tools = request.tool_choice, request.tools
        tools = None if choice.kind == "none" else tools
        if tools and "tools" not in self._sources:
            notes.ignored.append("tools")
        notes.ignored += [key for key in request.template_kwargs if key not in self._sources]
        try:
            begun = ""
            if choice.kind == "required":
                begun = forced_call(self._sources, choice.name)
            prompt = conversation_prompt(
                self.tokenizer,
                request.messages,
                tools,
                {**self._loaded.template_kwargs, **request.template_kwargs},
                begun,
            )
        except ConfigError as error:
            raise wrong("tool_choice", str(error), "unsupported") from None
        except DataError as error:
            raise wrong("messages", str(error)) from None
        return prompt, begun

    def completion_prompts(self, request: CompletionRequest) -> list[list[int]]:
        """The ids of every prompt; a text without any is the BOS token, if there is one."""
        bos = self.tokenizer.bos_token_id
        start = [] if bos is None else [bos]
        return [
            (self.tokenizer.encode(prompt) or start) if isinstance(prompt, str) else prompt
            for prompt in request.prompts
        ]

    def begin(
        self,
        model: ServedModel,
        prompts: Sequence[Sequence[int]],
        decoding: Decoding,
        *,
        echo: bool = False,
    ) -> Answers:
        """Queue the answers to all prompts, `decoding.choices` to each. Raises `ApiError`."""
        answers = Answers(
            self, len(prompts) * decoding.choices, sum(len(prompt) for prompt in prompts)
        )
        seed = secrets.randbits(62) if decoding.seed is None else decoding.seed
        deadline = time.monotonic() + self.bounds.seconds
        told = decoding.logprobs is not None
        for index in range(len(prompts) * decoding.choices):
            prompt = prompts[index // decoding.choices]
            self._check_ids(prompt, decoding)
            length = self._answer_length(len(prompt), decoding.max_tokens)
            settings = self._settings(model, decoding, length, seed + index)
            job = AnswerJob(
                prompt,
                replace(settings, prompt_logprobs=echo and told),
                AnswerPieces(self.texts, settings.stop_ids, told),
                deadline,
                partial(answers.post, index),
                score_only=decoding.max_tokens == 0,
            )
            answers.jobs.append(job)
        self.thread.submit(answers.jobs)
        self.metrics.count(self.metrics.prompt_tokens, by=answers.prompt_tokens)
        return answers

    def _answer_length(self, prompt: int, asked: int | None) -> int:
        """Tokens of the longest answer to a prompt of so many. Raises `ApiError`."""
        free, limit = self.bounds.context - prompt, self.bounds.answer
        if asked is not None and asked > limit:
            raise wrong(
                "max_tokens", f"{asked} tokens were asked for; an answer may have {limit} here"
            )
        if free < (1 if asked is None else asked):
            raise wrong(
                "max_tokens" if free > 0 else "prompt",
                f"the prompt has {prompt} tokens{f' and the answer {asked}' if asked else ''}; "
                f"together they may have {self.bounds.context}",
                "context_length_exceeded",
            )
        return max(1, min(limit, free) if asked is None else asked)

    def _check_ids(self, prompt: Sequence[int], decoding: Decoding) -> None:
        """Raises `ApiError` for ids that are not of the vocabulary."""
        if not prompt:
            raise wrong("prompt", "the prompt has no tokens; send at least one character")
        size = self._loaded.vocabulary
        for name, ids in (
            ("prompt", prompt),
            ("logit_bias", decoding.sampling.get("logit_bias", ())),
            ("stop_token_ids", decoding.stop_ids),
        ):
            outside = next((i for i in ids if not 0 <= i < size), None)
            if outside is not None:
                raise wrong(
                    name, f"{name} has the token id {str(outside)[:20]}; they end at {size - 1}"
                )

    def _settings(
        self, model: ServedModel, decoding: Decoding, length: int, seed: int
    ) -> RequestSettings:
        stop_ids = frozenset() if decoding.ignore_eos else model.stop_ids
        try:
            sampling = self.sampling(decoding.sampling)
        except ConfigError as error:
            raise ApiError(400, str(error)) from None
        whole = (seed + (1 << 63)) % (1 << 64) - (1 << 63)
        return RequestSettings(
            max_new_tokens=length,
            sampling=sampling.model_copy(update={"seed": whole}),
            stop_ids=stop_ids | set(decoding.stop_ids),
            stop=decoding.stop,
            logprobs=decoding.logprobs,
            adapter=model.adapter,
        )

    def sampling(self, given: Mapping[str, Any]) -> Sampling:
        """How tokens are drawn: as the request says, else generation_config.json, else OpenAI.

        Raises `ConfigError` for a generation_config.json that cannot be used.
        """
        config = self._loaded.generation_config
        if config.get("do_sample") is not True:
            given = {"temperature": 1.0, **given}
        return resolve_sampling(Sampling(**given), config, "the model")[0]
