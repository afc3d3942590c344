"""Rows and templates that do not fit at once: other spellings, and what is left out."""

from collections.abc import Callable
from typing import Any

import pytest

from engine.data.examples import build_examples
from engine.data.rendering import render_row
from engine.data.rows import Row
from engine.errors import DataError
from engine.tokenization.chat_template import CHATML, ChatTemplate
from engine.tokenization.messages import ConversationError
from engine.tokenization.tokenizer import Tokenizer

END = "<|im_end|>"
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]
TURN = "{{ '<|im_start|>' + m.role + '\n' }}BODY{{ '<|im_end|>\n' }}"


def template(body: str) -> ChatTemplate:
    source = "{% for m in messages %}" + TURN.replace("BODY", body) + "{% endfor %}"
    return ChatTemplate(source, end_tokens=["<|im_start|>", END])


def call(**more: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "add", "arguments": {"a": "é"}}, **more}


def row(*messages: dict[str, Any], line: int = 1, tools: Any = None) -> Row:
    return Row([{"role": "user", "content": "Q"}, *messages], line, "d.jsonl", tools=tools)


def say(content: Any, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


SPELLINGS = [
    ("{{ m.content + (m.tool_calls[0].function.name if m.tool_calls else '') }}", "add"),
    (
        "{{ m.content }}{% if m.tool_calls %}{{ m.tool_calls[0].function.name + ' ' + "
        "m.tool_calls[0].function.arguments }}{% endif %}",
        'add {"a": "é"}',
    ),
    (
        "{{ m.content }}{% for c in m.tool_calls or [] %}{% if c.id|length != 9 %}"
        "{{ raise_exception('nine') }}{% endif %}{{ c.function.name + c.id }}{% endfor %}",
        "add000000000",
    ),
    (
        "{% for part in m.content %}{{ part.text }}{% endfor %}"
        "{% if m.content is string %}{{ raise_exception('parts') }}{% endif %}"
        "{% for c in m.tool_calls or [] %}{{ c.function.name }}{% endfor %}",
        "add",
    ),
]


@pytest.mark.parametrize(("body", "shown"), SPELLINGS, ids=range(len(SPELLINGS)))
def test_a_row_is_rendered_in_the_spelling_that_the_template_wants(body: str, shown: str) -> None:
    located = render_row(row(say(None, tool_calls=[call()])), template(body), {})
    ((start, end),) = located.spans
    assert located.text[start:end] == f"{shown}{END}"


def test_ids_of_results_follow_those_of_their_calls() -> None:
    body = (
        "{{ m.content }}{% for c in m.tool_calls or [] %}{% if c.id|length != 9 %}"
        "{{ raise_exception('nine') }}{% endif %}{{ ' ' + c.function.name + c.id }}{% endfor %}"
        "{% if m.role == 'tool' %}{% if m.tool_call_id|length != 9 %}"
        "{{ raise_exception('nine') }}{% endif %}{{ m.tool_call_id }}{% endif %}"
    )
    ids = ["call_abcdefghi", "x_abcdefghi", "y"]
    results = [
        {"role": "tool", "content": "r", **({"tool_call_id": given} if given else {})}
        for given in (ids[1], None, ids[2])
    ]
    messages = [say("", tool_calls=[call(id=given) for given in ids]), *results, say("A")]
    text = render_row(row(*messages), template(body), {}).text
    assert " addabcdefghi add000000001 add000000002" in text
    assert "r000000001" in text.split("tool")[1]
    assert "rabcdefghi" in text.split("tool")[2]
    assert "r000000002" in text.split("tool")[3]


def test_a_row_that_the_template_accepts_is_not_changed() -> None:
    given = [call(id="call_of_more_than_nine")]
    body = "{{ m.content }}{{ m.tool_calls | tojson if m.tool_calls else '' }}"
    text = render_row(row(say("", tool_calls=given)), template(body), {}).text
    assert "call_of_more_than_nine" in text
    assert '"arguments": {"a": "é"}' in text


def test_the_error_is_that_of_the_row_as_it_stands() -> None:
    body = "{{ raise_exception('no ' ~ m.role) }}"
    with pytest.raises(ConversationError, match="no user"):
        render_row(row(say(None, tool_calls=[call()])), template(body), {})


def test_what_the_template_leaves_out_is_counted_and_named(
    make_tokenizer: Callable[..., Tokenizer], caplog: pytest.LogCaptureFixture
) -> None:
    source = (
        "{% for m in messages if m.role != 'system' %}"
        "{{ '<|im_start|>' + m.role + '\n' + m.content.split('</think>')[-1] + '<|im_end|>\n' }}"
        "{% endfor %}"
    )
    tokenizer = make_tokenizer("chatml", template=source)
    rows = [
        row(say("A")),
        row(say("A", reasoning_content="R"), say("<think>R</think>B"), line=2),
        row(say("A", reasoning_content="R"), line=3, tools=TOOLS),
        Row([{"role": "system", "content": "S"}, *row(say("A")).messages], 4, "d.jsonl"),
    ]
    _, report = build_examples(rows, tokenizer, 200)
    assert report.left_out == {"reasoning": 3, "tools": 1, "system": 1}
    firsts = {"reasoning": "d.jsonl:2", "tools": "d.jsonl:3", "system": "d.jsonl:4"}
    assert report.left_out_first == firsts
    notes = report.notes()
    assert [record.message for record in caplog.records][-3:] == notes
    assert any("reasoning of 3 messages (first in d.jsonl:2)" in note for note in notes)
    assert any("tools of 1 rows (first in d.jsonl:3)" in note for note in notes)


KNOWN_ROLES = (
    "{% for m in messages if m.role in ROLES %}"
    "{{ '<|im_start|>' + m.role + '\n' + (m.content or '') + (m.tool_calls | tojson if "
    "m.tool_calls else '') + '<|im_end|>\n' }}{% endfor %}"
)
STRICT_ROLES = "{% for m in messages if m.role not in ROLES %}{{ raise_exception(m.role) }}"
STRICT_ROLES += "{% endfor %}" + KNOWN_ROLES


@pytest.mark.parametrize("source", [KNOWN_ROLES, STRICT_ROLES], ids=["passes over", "refuses"])
@pytest.mark.parametrize("role", ["function", "ipython", "tool"])
def test_results_and_instructions_are_read_whatever_their_role_is_called(
    source: str, role: str
) -> None:
    roles = "{% set ROLES = ['system', 'user', 'assistant', 'tool'] %}"
    chat = ChatTemplate(roles + source, end_tokens=["<|im_start|>", END])
    given = row(say("", tool_calls=[call()]), {"role": role, "content": "3"}, say("A"))
    given.messages.insert(0, {"role": "developer", "content": "S"})
    located = render_row(given, chat, {})
    assert f"<|im_start|>tool\n3{END}" in located.text
    assert f"<|im_start|>system\nS{END}" in located.text
    assert located.left_out == {}


@pytest.mark.parametrize("role", ["function", "ipython", "tool"])
def test_a_template_that_leaves_out_results_says_so(
    make_tokenizer: Callable[..., Tokenizer], role: str
) -> None:
    source = "{% set ROLES = ['system', 'user', 'assistant'] %}" + KNOWN_ROLES
    rows = [row(say("", tool_calls=[call()]), {"role": role, "content": "3"}, say("A"))]
    _, report = build_examples(rows, make_tokenizer("chatml", template=source), 400)
    assert report.left_out == {"result": 1}
    assert any("leaves out the tool results of 1 messages" in note for note in report.notes())


def test_a_role_that_the_template_shows_keeps_its_name() -> None:
    given = row(say("", tool_calls=[call()]), {"role": "function", "content": "3"}, say("A"))
    given.messages.insert(0, {"role": "developer", "content": "S"})
    body = "{{ m.content }}{{ m.tool_calls | tojson if m.tool_calls else '' }}"
    text = render_row(given, template(body), {}).text
    assert f"function\n3{END}" in text
    assert f"developer\nS{END}" in text


def test_nothing_is_left_out_where_the_template_shows_all(
    tokenizers_by_family: dict[str, Tokenizer],
) -> None:
    rows = [
        row(say("A", reasoning_content="R")),
        row(say("", tool_calls=[call()]), {"role": "tool", "content": "3"}, say("A"), tools=TOOLS),
    ]
    _, report = build_examples(rows, tokenizers_by_family["qwen3"], 2000)
    assert report.left_out == {}


def test_rows_that_do_not_fit_the_template_count_among_the_bad_ones(
    make_tokenizer: Callable[..., Tokenizer],
) -> None:
    source = "{% if messages[0].content == 'Q' and messages[1].content == 'bad' %}"
    source += "{{ raise_exception('bad') }}{% endif %}" + CHATML
    tokenizer = make_tokenizer("chatml", template=source)
    rows = [row(say("bad" if line == 3 else "A"), line=line) for line in range(1, 11)]
    with pytest.raises(ConversationError, match=r"d.jsonl:3: .* `--bad-lines skip`"):
        build_examples(rows, tokenizer, 64)
    for policy in ("skip", "skip:10%"):
        examples, report = build_examples(rows, tokenizer, 64, bad_rows=policy)
        assert (len(examples), report.misfits) == (9, 1)
    with pytest.raises(DataError, match="1 of 10 rows do not fit the chat template, more than"):
        build_examples(rows, tokenizer, 64, bad_rows="skip:5%")


def test_the_template_for_tools_is_used_where_a_row_has_tools(
    make_tokenizer: Callable[..., Tokenizer],
) -> None:
    named = {"default": CHATML, "tool_use": "{{ tools | tojson }}\n" + CHATML}
    tokenizer = make_tokenizer("chatml", template=named)
    messages = row(say("A")).messages
    plain = tokenizer.chat_template.render(messages)
    with_tools = tokenizer.chat_template.render(messages, tools=TOOLS)
    assert '"add"' in with_tools
    assert with_tools.endswith(plain)
    rows = [row(say("A"), tools=TOOLS), row(say("A"), line=2)]
    examples, report = build_examples(rows, tokenizer, 500)
    assert report.left_out == {}
    assert len(examples[0]) > len(examples[1])
    assert tokenizer.chat_template.sources == tuple(named.values())
