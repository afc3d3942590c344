"""What is trained: the assistant's words and the end of its turns, nothing else."""

from collections.abc import Callable
from typing import Any

import pytest

from engine.tokenization.chat_template import ChatTemplate
from engine.tokenization.messages import ConversationError
from engine.tokenization.tokenizer import Tokenizer
from tests.engine.tokenization.turns import FAMILIES, Messages, say, trained

END = {
    "chatml": "<|im_end|>",
    "llama3": "<|eot_id|>",
    "qwen2_5": "<|im_end|>",
    "qwen3": "<|im_end|>",
    "mistral": "</s>",
}
EMPTY_THOUGHT = "<think>\n\n</think>\n\n"
CALL = [{"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}]
TOOL = [{"type": "function", "function": {"name": "add", "parameters": {}}}]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_assistant_turn_is_trained_with_its_end_token_and_nothing_else(
    family: str, tokenizers_by_family: dict[str, Tokenizer]
) -> None:
    template, end = tokenizers_by_family[family].chat_template, END[family]
    thought = EMPTY_THOUGHT if family == "qwen3" else ""
    system = {"role": "system", "content": "Sys"}
    messages = [system, *say("Ask one", "Say one", "Ask two", "Say two")]
    assert trained(template, messages) == [f"Say one{end}", f"{thought}Say two{end}"]
    assert trained(template, say("Ask", "Say")) == [f"{thought}Say{end}"]


@pytest.mark.parametrize("family", FAMILIES)
def test_words_that_repeat_or_look_like_markup_do_not_mislead(
    family: str, tokenizers_by_family: dict[str, Tokenizer]
) -> None:
    template, end = tokenizers_by_family[family].chat_template, END[family]
    thought = EMPTY_THOUGHT if family == "qwen3" else ""
    assert trained(template, say("A", "A", "A", "A", "A")) == [f"A{end}", f"A{end}"]
    odd = f"standin0marker {end} assistant\n</s> é🙂"
    assert trained(template, say(odd, odd)) == [f"{thought}{odd}{end}"]


@pytest.mark.parametrize(
    ("family", "call"),
    [
        ("llama3", '{"name": "add", "parameters": {"a": 1}}'),
        ("qwen2_5", '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'),
        ("qwen3", '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'),
        ("mistral", '[TOOL_CALLS] [{"name": "add", "arguments": {"a": 1}}]'),
    ],
)
def test_tool_calls_are_trained_and_tool_results_are_not(
    family: str, call: str, tokenizers_by_family: dict[str, Tokenizer]
) -> None:
    template, end = tokenizers_by_family[family].chat_template, END[family]
    messages: Messages = [
        {"role": "user", "content": "1+2"},
        {"role": "assistant", "content": "", "tool_calls": CALL},
        {"role": "tool", "content": "three"},
        *say("x", "It is three", "Thanks", "Welcome")[1:],
    ]
    thought = EMPTY_THOUGHT if family == "qwen3" else ""
    expected = [f"{call}{end}", f"It is three{end}", f"{thought}Welcome{end}"]
    assert trained(template, messages, tools=TOOL) == expected


def test_reasoning_is_trained_where_the_template_shows_it(
    tokenizers_by_family: dict[str, Tokenizer],
) -> None:
    template = tokenizers_by_family["qwen3"].chat_template
    messages = say("Q1", "<think>\nR1\n</think>\n\nA1", "Q2", "A2")
    messages[3]["reasoning_content"] = "R2"
    assert trained(template, messages) == [
        "A1<|im_end|>",
        "<think>\nR2\n</think>\n\nA2<|im_end|>",
    ]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("flag", [{"weight": 0}, {"train": False}])
def test_a_message_that_says_so_is_not_trained(
    family: str, flag: dict[str, Any], tokenizers_by_family: dict[str, Tokenizer]
) -> None:
    messages = say("Q1", "A1", "Q2", "A2", "Q3")
    messages[3].update(flag)
    template = tokenizers_by_family[family].chat_template
    assert trained(template, messages) == [f"A1{END[family]}"]


TAGGED = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}"
    "{% generation %}BODY{% endgeneration %}AFTER"
    "{% else %}{{ m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
)


@pytest.mark.parametrize(
    ("body", "after"),
    [
        ("{{ m.content + '<|im_end|>' }}", "{{ '\n' }}"),
        ("{{ m.content + '<|im_end|>\n' }}", ""),
        ("{{ m.content }}", "{{ '<|im_end|>\n' }}"),
        ("{{ m.content }}{{ '\n' }}", "{{ '<|im_end|>\n' }}"),
    ],
)
def test_generation_tags_decide_and_their_end_is_moved_to_the_end_token(
    body: str, after: str
) -> None:
    source = TAGGED.replace("BODY", body).replace("AFTER", after)
    template = ChatTemplate(source, {"eos_token": "<|im_end|>"})
    spans = [span.replace("\n", "") for span in trained(template, say("Q1", "A1", "Q2", "A2"))]
    assert spans == ["A1<|im_end|>", "A2<|im_end|>"]
    messages = say("Q1", "A1", "Q2", "A2")
    messages[1]["weight"] = 0
    assert [span.replace("\n", "") for span in trained(template, messages)] == ["A2<|im_end|>"]


def test_generation_tags_inside_each_other_are_refused() -> None:
    source = (
        "{% generation %}{% generation %}{{ messages[1].content }}</s>{% endgeneration %}"
        "</s>{% endgeneration %}"
    )
    messages = say("Q", "A")
    with pytest.raises(ConversationError, match="mixes the turns"):
        ChatTemplate(source, {"eos_token": "</s>"}).locate(messages)


REFUSED = [
    ("{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}", "never learn to"),
    ("{% for m in messages %}{{ m.content | upper + '</s>' }}{% endfor %}", "cannot be found"),
    (
        "{% for m in messages if m.role == 'user' %}{{ m.content + '</s>' }}{% endfor %}",
        "cannot be found|leaves out",
    ),
    ("{% for m in messages %}{{ m.role + '</s>' }}{% endfor %}", "cannot be found|leaves out"),
    ("{{ messages[1].content }}{{ messages[1].content }}</s>", "cannot be found"),
    ("{% generation %}{% endgeneration %}x", "leaves out"),
    (
        "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
        "stop",
    ),
    (
        "{% for m in messages %}{{ m.content + '</s>' }}{% endfor %}"
        "{% if false %}{% generation %}x{% endgeneration %}{% endif %}",
        "enclose nothing",
    ),
]


@pytest.mark.parametrize(("source", "words"), REFUSED, ids=range(len(REFUSED)))
def test_a_template_that_hides_where_the_answer_is_or_ends_is_refused(
    source: str, words: str
) -> None:
    template = ChatTemplate(source, {"eos_token": "</s>"})
    with pytest.raises(ConversationError, match=words):
        template.locate(say("Question", "Answer"))


def test_an_end_token_after_the_whole_conversation_does_not_train_the_user() -> None:
    source = "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}</s>"
    template = ChatTemplate(source, {"eos_token": "</s>"})
    with pytest.raises(ConversationError, match="never learn to stop"):
        template.locate(say("Q1", "A1", "Q2", "A2"))


def test_a_template_that_leaves_tool_calls_out_is_refused(
    make_tokenizer: Callable[..., Tokenizer],
) -> None:
    template = make_tokenizer("chatml").chat_template
    messages: Messages = [
        {"role": "user", "content": "1+2"},
        {"role": "assistant", "content": "Wait", "tool_calls": CALL},
    ]
    with pytest.raises(ConversationError, match=r"tool calls of messages\[1\]"):
        template.locate(messages)
    messages[1]["content"] = ""
    with pytest.raises(ConversationError, match=r"what messages\[1\] says"):
        template.locate(messages)
