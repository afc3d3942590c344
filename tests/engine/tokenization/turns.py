"""Conversations and what a chat template trains of them, for the tests of loss spans."""

from typing import Any

from engine.tokenization.chat_template import ChatTemplate

Messages = list[dict[str, Any]]
FAMILIES = ("chatml", "llama3", "qwen2_5", "qwen3", "mistral")


def say(*contents: str) -> Messages:
    """A conversation of a user, who begins, and an assistant."""
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": content} for i, content in enumerate(contents)]


def trained(template: ChatTemplate, messages: Messages, **kwargs: Any) -> list[str]:
    """The texts of the loss spans; the whole is what the template renders without looking."""
    located = template.locate(messages, **kwargs)
    assert located.text == template.render(messages, **kwargs)
    return [located.text[start:end] for start, end in located.spans]
