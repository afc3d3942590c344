"""A generator that says what it is told to, for tests of the server around it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from engine.inference.batched import BatchedGenerator
from engine.inference.request import Answer, RequestSettings, TokenEvent, TokenLogprobs
from engine.serving.model_thread import ModelThread
from engine.serving.service import Bounds, Loaded, ServedModel, Service
from engine.tokenization.tokenizer import Tokenizer


@dataclass
class _Line:
    """An answer that is being said: its ids, and how many of them were."""

    ids: list[int]
    answer: Answer
    settings: RequestSettings
    prompt: list[int]
    said: int = 0


class ScriptedGenerator(BatchedGenerator):
    """Answers every prompt with `script(prompt)`, one token a step; without a model.

    `gate` holds every step back until it is set; `fail_at` is the step that raises.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        script: Callable[[str], str],
        slots: int = 4,
        fail_at: int | None = None,
    ) -> None:
        self.tokenizer, self.script, self.slots = tokenizer, script, slots
        self.gate = threading.Event()
        self.gate.set()
        self.asked: list[RequestSettings] = []
        self.lines: dict[int, _Line] = {}
        self.steps, self._fail_at = 0, fail_at

    def submit(self, prompt: Sequence[int], settings: RequestSettings | None = None) -> int:
        assert settings is not None
        assert self.tokenizer is not None
        number = len(self.asked)
        self.asked.append(settings)
        text = self.script(self.tokenizer.decode(prompt, skip_special_tokens=False))
        ids = self.tokenizer.encode(text, add_special_tokens=False)
        self.lines[number] = _Line(ids, Answer(self.tokenizer, settings), settings, list(prompt))
        return number

    def cancel(self, number: int) -> bool:
        return self.lines.pop(number, None) is not None

    def step(self) -> list[TokenEvent]:
        self.gate.wait(10)
        self.steps += 1
        if self.steps == self._fail_at:
            raise RuntimeError("a planted fault")
        events = [self._say(number, line) for number, line in list(self.lines.items())]
        for event in events:
            if event.finish_reason is not None:
                del self.lines[event.request]
        return events

    def _say(self, number: int, line: _Line) -> TokenEvent:
        end = min(line.settings.stop_ids, default=0)
        token = line.ids[line.said] if line.said < len(line.ids) else end
        line.said += 1
        text = line.answer.push(token)
        told = None
        if line.settings.logprobs is not None:
            top = tuple((token + i, -0.5 - i) for i in range(line.settings.logprobs))
            told = TokenLogprobs(token, -0.5, top)
        prompt = None
        if line.settings.prompt_logprobs and line.said == 1:
            prompt = tuple(TokenLogprobs(index, -1.0) for index in line.prompt[1:])
        return TokenEvent(number, token, text, told, line.answer.finish_reason, prompt)


def scripted_service(
    tokenizer: Tokenizer,
    script: Callable[[str], str] | str,
    *,
    waiting: int = 8,
    bounds: Bounds | None = None,
    loaded: dict[str, Any] | None = None,
    **options: Any,
) -> Service:
    """A started service of the models `base` and `tuned` that says `script`."""
    say = script if callable(script) else lambda _: str(script)
    generator = ScriptedGenerator(tokenizer, say, **options)
    end = tokenizer.eos_token_id
    stop_ids = frozenset(() if end is None else (end,))
    models = [ServedModel("base", None, stop_ids), ServedModel("tuned", "tuned", stop_ids)]
    known = Loaded(tokenizer, tokenizer.vocab_size, models, **(loaded or {}))
    thread = ModelThread(generator, waiting)
    thread.start()
    return Service(known, thread, bounds or Bounds(context=4096, answer=512, seconds=60))
