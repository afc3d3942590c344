"""Prompts of conversations, in the spellings that training reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from engine.conversation.reasoning import opened_by
from engine.data.rendering import spellings, usual_role
from engine.tokenization.chat_template import ChatTemplate
from engine.tokenization.messages import ConversationError, LimitError
from engine.tokenization.tokenizer import Tokenizer

RESERVED = frozenset({"messages", "tools", "add_generation_prompt", "documents"})
"""Variables of a template that no setting may replace."""


@dataclass(frozen=True)
class Prompt:
    """A rendered conversation: its ids, and the tag with which it begins a reasoning, or None."""

    ids: list[int]
    opened: str | None


def conversation_prompt(
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, Any]],
    tools: list[dict[str, Any]] | None = None,
    template_kwargs: Mapping[str, Any] | None = None,
    begun: str = "",
) -> Prompt:
    """The ids that a model continues with an assistant's answer, of which `begun` is given.

    Raises `ConversationError` where the template refuses the messages in every spelling, and
    `DataError` for a template that cannot be rendered.
    """
    template = tokenizer.chat_template
    text = rendered(template, messages, tools, template_kwargs or {}) + begun
    return Prompt(tokenizer.encode(text, add_special_tokens=False), opened_by(text))


def rendered(
    template: ChatTemplate,
    messages: Sequence[Mapping[str, Any]],
    tools: list[dict[str, Any]] | None,
    kwargs: Mapping[str, Any],
) -> str:
    """The conversation up to the beginning of an answer, in the first spelling that is accepted.

    A role that the template does not name, such as `developer`, goes under its usual name: most
    templates pass over what they do not know, without a word.
    """
    known = "".join(template.sources)
    first = [
        {**message, "role": usual_role(message["role"])} if message["role"] not in known
        else dict(message)
        for message in messages
    ]  # fmt: skip
    settings = {key: value for key, value in kwargs.items() if key not in RESERVED}
    try:
        return template.render(first, add_generation_prompt=True, tools=tools, **settings)
    except LimitError:
        raise
    except ConversationError as error:
        for other in spellings(first):
            try:
                return template.render(other, add_generation_prompt=True, tools=tools, **settings)
            except ConversationError:
                continue
        raise error
