"""A model that answers a chat, with and without its adapter."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from engine.conversation.chat_loop import Reply
from engine.conversation.prompts import Prompt
from engine.errors import CheckpointError, ConfigError
from engine.inference.batched import BatchedGenerator
from engine.inference.request import RequestSettings


@dataclass
class ModelSpeaker:
    """Answers on a generator that this object has for itself.

    Attributes:
        generator: of the model, with at least two slots.
        settings: how answers are made; their length is cut to what the context leaves.
        stop_ids: what ends an answer of the base model.
        tuned_stop_ids: what ends one with the adapter.
        adapter: the adapter's name in the generator, or None.
    """

    generator: BatchedGenerator
    settings: RequestSettings
    stop_ids: frozenset[int]
    tuned_stop_ids: frozenset[int]
    adapter: str | None = None

    @property
    def has_adapter(self) -> bool:
        return self.adapter is not None

    def answer(
        self, prompts: Sequence[tuple[Prompt, bool]], on_text: Callable[[int, str], None]
    ) -> list[Reply]:
        """As `Speaker.answer`. Raises `ConfigError` for a prompt that the context cannot hold."""
        numbers: dict[int, int] = {}
        replies = [Reply("stopped", 0)] * len(prompts)
        try:
            for index, (prompt, tuned) in enumerate(prompts):
                numbers[self._submit(prompt, tuned)] = index
            while self.generator.active or self.generator.waiting:
                for event in self.generator.step():
                    index = numbers[event.request]
                    if event.error is not None:
                        raise CheckpointError(event.error)
                    if event.text:
                        on_text(index, event.text)
                    tokens = replies[index].tokens + 1
                    replies[index] = Reply(event.finish_reason or "stopped", tokens)
        finally:
            for number in numbers:
                self.generator.cancel(number)
        return replies

    def _submit(self, prompt: Prompt, tuned: bool) -> int:
        with_adapter = tuned and self.adapter is not None
        context = self.generator.model.config.max_position_embeddings
        left = context - len(prompt.ids)
        if left < 1:
            raise ConfigError(
                f"The conversation has {len(prompt.ids)} tokens, and this model reads {context}: "
                "/reset begins a new one."
            )
        settings = replace(
            self.settings,
            max_new_tokens=min(self.settings.max_new_tokens, left),
            stop_ids=self.tuned_stop_ids if with_adapter else self.stop_ids,
            adapter=self.adapter if with_adapter else None,
        )
        return self.generator.submit(prompt.ids, settings)
