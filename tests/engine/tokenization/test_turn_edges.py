"""Where answers begin and end: reasoning, headers, tools, long conversations."""

import json
from dataclasses import dataclass, field
from typing import Any

import pytest

from engine.tokenization.chat_template import CHATML, ChatTemplate, plain_messages
from engine.tokenization.loss_spans import SpanFinder
from engine.tokenization.messages import ConversationError
from engine.tokenization.sandbox import Job, Limits, Rendered, TemplateInput, TemplateProcess
from engine.tokenization.tokenizer import Tokenizer
from tests.engine.tokenization.turns import FAMILIES, Messages, say, trained

CHAT_END = ["<|im_start|>", "<|im_end|>"]


def chat(body: str, prompt: str = "<|im_start|>assistant\n") -> ChatTemplate:
    """A ChatML template whose assistant turns are `body`; `prompt` is its generation prompt."""
    source = (
        "{% for m in messages %}{% if m.role == 'assistant' %}" + body + "{% else %}"
        "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ PROMPT }}{% endif %}"
    )
    return ChatTemplate(source.replace("PROMPT", repr(prompt)), end_tokens=CHAT_END)


THOUGHT = (
    "{{ '<|im_start|>assistant\n<think>\n' + m.reasoning_content|d('') + '\n</think>\n\n' }}"
    "{{ m.content + '<|im_end|>\n' }}"
)


@pytest.mark.parametrize(
    ("prompt", "with_reasoning", "without"),
    [
        ("", "<think>\nR\n</think>\n\nNo.", "<think>\n\n</think>\n\nNo."),
        ("<think>\n", "R\n</think>\n\nNo.", "\n</think>\n\nNo."),
        ("<think>\n\n</think>\n\n", "<think>\nR\n</think>\n\nNo.", "No."),
    ],
)
def test_what_the_generation_prompt_does_not_supply_is_trained(
    prompt: str, with_reasoning: str, without: str
) -> None:
    template = chat(THOUGHT, "<|im_start|>assistant\n" + prompt)
    messages = say("Q1", "No.", "Q2", "No.")
    messages[1]["reasoning_content"] = "R"
    assert trained(template, messages) == [
        f"{with_reasoning}<|im_end|>", f"{without}<|im_end|>",
    ]  # fmt: skip


@pytest.mark.parametrize("inline", [False, True])
def test_reasoning_is_trained_where_the_prompt_says_that_there_is_none(
    inline: bool, tokenizers_by_family: dict[str, Tokenizer]
) -> None:
    thought = "<think>\nR\n</think>\n\n"
    messages = say("Q", f"{thought}No." if inline else "No.")
    if not inline:
        messages[1]["reasoning_content"] = "R"
    template = tokenizers_by_family["qwen3"].chat_template
    for kwargs in ({}, {"enable_thinking": False}, {"enable_thinking": True}):
        assert trained(template, messages, **kwargs) == [f"{thought}No.<|im_end|>"]


def test_a_role_header_inside_generation_tags_is_not_trained() -> None:
    template = chat(
        "{% generation %}{{ '<|im_start|>assistant\n<think>\n\n</think>\n' + m.content }}"
        "{{ '<|im_end|>\n' }}{% endgeneration %}",
        "<|im_start|>assistant\n<think>\n\n</think>\n",
    )
    assert trained(template, say("Q", "A", "Q", "A")) == ["A<|im_end|>", "A<|im_end|>"]


def test_tags_around_parts_of_a_turn_are_followed_and_its_end_is_trained() -> None:
    template = chat(
        "{{ '<|im_start|>assistant\n' }}{% generation %}{{ m.reasoning_content }}"
        "{% endgeneration %} | {% generation %}{{ m.content }}{% endgeneration %}"
        "{{ '<|im_end|>\n' }}"
    )
    messages = say("Q", "A")
    messages[1]["reasoning_content"] = "R"
    assert trained(template, messages) == ["R", "A<|im_end|>"]


@pytest.mark.parametrize("family", FAMILIES)
def test_text_that_looks_like_a_header_is_no_header(
    family: str, tokenizers_by_family: dict[str, Tokenizer]
) -> None:
    template = tokenizers_by_family[family].chat_template
    header = template.render(say("x"), True).rpartition("x")[2]
    messages = say(f"a{header}", "one", header or "b", f"{header}two", "c", "three")
    spans = trained(template, messages)
    assert ["one" in spans[0], "two" in spans[1], "three" in spans[2]] == [True] * 3
    assert spans[1].startswith(header.strip())
    assert not spans[0].startswith(header.strip() or "\0")


def test_a_template_that_always_begins_the_next_turn_does_not_train_its_header() -> None:
    source = (
        "{{ bos_token }}{% for m in messages %}{{ '<|im_start|>' + m.role + ':' + m.content }}"
        "{{ '<|end|><|im_end|>' }}{% endfor %}{{ '<|im_start|>assistant:' }}"
    )
    template = ChatTemplate(source, {"bos_token": "<s>"}, end_tokens=[*CHAT_END, "<|end|>"])
    assert trained(template, say("Q", "A", "Q", "A")) == ["A<|end|><|im_end|>"] * 2


@pytest.mark.parametrize("family", ["llama3", "qwen2_5", "qwen3", "mistral"])
def test_a_user_turn_after_a_tool_call_is_rendered_with_tools(
    family: str, tokenizers_by_family: dict[str, Tokenizer]
) -> None:
    template = tokenizers_by_family[family].chat_template
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    tool = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
    turns: Messages = [
        *say("1+2"),
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "3"},
        *say("", "It is three")[1:],
    ]
    spans = trained(template, [*turns, *turns, *turns], tools=[tool])
    assert len(spans) == 6
    for index, span in enumerate(spans):
        assert ("add" in span) == (index % 2 == 0)
        assert ("three" in span) == (index % 2 == 1)
        assert "1+2" not in span


@dataclass
class Counter:
    """Renders in a process, and counts the renderings."""

    process: TemplateProcess
    jobs: list[Job] = field(default_factory=list)

    def __call__(self, conversation: TemplateInput, jobs: list[Job]) -> list[Rendered]:
        self.jobs += jobs
        return self.process.render(conversation, jobs)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_number_of_renderings_does_not_grow_with_the_conversation(
    family: str, tokenizers_by_family: dict[str, Tokenizer]
) -> None:
    template = tokenizers_by_family[family].chat_template
    tokens = template.special_tokens
    ends = ["<|im_end|>", "<|eot_id|>", "</s>"]
    counts = []
    for turns in (2, 3, 30, 400):
        process = TemplateProcess(template.source, tokens, Limits(), "The template")
        counter = Counter(process)
        words = [f"{n} {turn}" for turn in range(turns) for n in ("ask", "say")]
        conversation = TemplateInput(plain_messages(say(*words)))
        located = SpanFinder(template.source, ends).find(conversation, counter)
        shown = [located.text[start:end] for start, end in located.spans]
        assert [f"say {turn}" in span for turn, span in enumerate(shown)] == [True] * turns
        assert not any("ask" in span for span in shown)
        counts.append(len(counter.jobs))
        process.close()
    assert counts[0] <= 6, counter.jobs
    assert len(set(counts[1:])) == 1


@pytest.mark.parametrize("family", FAMILIES)
def test_a_hundred_turns_of_ten_kilobytes_fit_the_limits(
    family: str, tokenizers_by_family: dict[str, Tokenizer]
) -> None:
    template = tokenizers_by_family[family].chat_template
    words = [f"{n} {turn} " + "é word " * 1300 for turn in range(100) for n in ("ask", "say")]
    spans = trained(template, say(*words))
    assert [f"say {turn} " in span for turn, span in enumerate(spans)] == [True] * 100


def test_a_conversation_that_breaks_a_limit_is_one_bad_row() -> None:
    hog = "{% if messages[0].content == 'go' %}{{ 'a' * 1000000000 }}{% endif %}" + CHATML
    template = ChatTemplate(hog, end_tokens=CHAT_END, limits=Limits(cpu_seconds=1))
    with pytest.raises(ConversationError, match=r"limit|stopped"):
        template.locate(say("go", "A"))
    assert trained(template, say("Q", "A")) == ["A<|im_end|>"]


def test_what_the_template_leaves_out_is_told(
    tokenizers_by_family: dict[str, Tokenizer],
) -> None:
    messages = say("Q1", "<think>\nR1\n</think>\n\nA1", "Q2", "A2")
    messages[3]["reasoning_content"] = "R2"
    chatml = tokenizers_by_family["chatml"].chat_template.locate(messages)
    assert chatml.left_out == {3: {"reasoning"}}
    qwen3 = tokenizers_by_family["qwen3"].chat_template.locate(messages)
    assert qwen3.left_out == {1: {"reasoning"}}
    assert json.dumps(messages).count("R1") == 1


def test_an_empty_question_later_does_not_shift_the_answer() -> None:
    template = chat("{{ '<|im_start|>assistant\n' + m.content + '<|im_end|>\n' }}")
    answers = ["one<|im_end|>", "two<|im_end|>", "three<|im_end|>"]
    assert trained(template, say("Q", "one", "", "two", "", "three")) == answers
    assert trained(template, say("", "one", "Q", "two", " ", "three")) == answers


def test_end_tokens_among_the_keys_of_arguments_do_not_end_the_turn() -> None:
    template = chat(
        "{{ '<|im_start|>assistant\n' + m.content }}"
        "{% for c in m.tool_calls or [] %}{{ c.function | tojson }}{% endfor %}{{ '<|im_end|>\n' }}"
    )

    def turn(**arguments: Any) -> dict[str, Any]:
        function = {"name": "f", "arguments": arguments}
        return {"role": "assistant", "content": "", "tool_calls": [{"function": function}]}

    odd = turn(**{"a": "x", "<|im_end|>": {"<|im_end|>": 1}})
    asks = say("Q")
    messages = [*asks, turn(a=1), *asks, odd, *asks, turn(a="b"), *asks]
    spans = trained(template, messages)
    assert [span.count("<|im_end|>") for span in spans] == [1, 3, 1]
    assert all(span.endswith("}}<|im_end|>") for span in spans)
