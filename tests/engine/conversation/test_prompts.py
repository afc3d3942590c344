"""Prompts of conversations are what the model's template writes, in a spelling that it takes."""

from typing import Any

import pytest

from engine.conversation.prompts import conversation_prompt, rendered
from engine.tokenization.messages import ConversationError
from engine.tokenization.tokenizer import Tokenizer

Tokenizers = dict[str, Tokenizer]
QUESTION: dict[str, Any] = {"role": "user", "content": "What?"}


def text_of(tokenizer: Tokenizer, messages: list[dict[str, Any]], **kwargs: Any) -> str:
    return rendered(tokenizer.chat_template, messages, None, kwargs)


def test_a_prompt_is_the_renderers_text(tokenizers_by_family: Tokenizers) -> None:
    tokenizer = tokenizers_by_family["qwen3"]
    prompt = conversation_prompt(tokenizer, [QUESTION])
    text = tokenizer.chat_template.render([QUESTION], add_generation_prompt=True)
    assert prompt.ids == tokenizer.encode(text, add_special_tokens=False)
    assert prompt.opened is None


def test_settings_of_the_template_are_handed_on(tokenizers_by_family: Tokenizers) -> None:
    tokenizer = tokenizers_by_family["qwen3"]
    assert text_of(tokenizer, [QUESTION], enable_thinking=False).endswith("</think>\n\n")
    # A setting does not replace the conversation.
    other = rendered(tokenizer.chat_template, [QUESTION], None, {"messages": [], "tools": []})
    assert other == text_of(tokenizer, [QUESTION])


def test_a_role_that_the_template_would_pass_over_goes_by_its_usual_name(
    tokenizers_by_family: Tokenizers,
) -> None:
    tokenizer = tokenizers_by_family["qwen3"]
    developer = {"role": "developer", "content": "Be brief."}
    assert "<|im_start|>system\nBe brief." in text_of(tokenizer, [developer, QUESTION])


def test_earlier_reasoning_is_left_out_as_the_template_wants(
    tokenizers_by_family: Tokenizers,
) -> None:
    tokenizer = tokenizers_by_family["qwen3"]
    answer = {"role": "assistant", "content": "This.", "reasoning_content": "Hm."}
    text = text_of(tokenizer, [QUESTION, answer, QUESTION])
    assert "This." in text
    assert "Hm." not in text


def test_a_call_without_content_is_rendered_in_a_spelling_that_is_taken(
    tokenizers_by_family: Tokenizers,
) -> None:
    call = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
    messages = [QUESTION, {"role": "assistant", "tool_calls": [call]},
                {"role": "tool", "content": "2", "tool_call_id": "call_1"}]  # fmt: skip
    for name in ("qwen2_5", "qwen3", "llama3", "mistral"):
        assert "x" in text_of(tokenizers_by_family[name], messages)


def test_what_no_spelling_saves_is_refused(tokenizers_by_family: Tokenizers) -> None:
    with pytest.raises(ConversationError, match="refuses"):
        text_of(tokenizers_by_family["mistral"], [QUESTION, {**QUESTION, "role": "system"}])
