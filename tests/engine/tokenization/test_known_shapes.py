"""Where a shape is known, the spans are those of a look in full; where anything differs, none."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.tokenization.chat_template import CHATML, ChatTemplate
from engine.tokenization.sandbox import Limits
from tests.engine.tokenization.turns import FAMILIES, Messages, say

TEMPLATES = Path(__file__).parents[2] / "fixtures" / "templates"
TOKENS = {"bos_token": "<s>", "eos_token": "<|im_end|>"}
ENDS = ["<|im_end|>", "<|eot_id|>", "</s>", "<|endoftext|>"]
PLAIN = CHATML.replace("{%- generation %}", "").replace("{%- endgeneration %}", "")
SOURCES = {
    **{name: (TEMPLATES / f"{name}.jinja").read_text() for name in FAMILIES},
    "tagged": CHATML,
    "shouts": PLAIN.replace(
        "{{- '\\n' }}",
        "{% if 'loud' in message['content'] %}{{ '!' }}{% endif %}{{- '\\n' }}",
    ),
    "counts": PLAIN.replace("+ '<|im_end|>'", "+ (message['content'] | length | string)[:1]"
                                              " + '<|im_end|>'"),
    "strips": PLAIN.replace("message['content'] +", "(message['content'] | trim) +"),
}  # fmt: skip
WORDS = st.text(st.sampled_from("ab c\né.<>[]{}#7"), min_size=1, max_size=12)
TALKS = st.lists(
    st.one_of(WORDS, st.sampled_from(["loud", " x ", "<think>a</think>b", "a<|im_end|>", "q\n"])),
    min_size=2, max_size=4,
)  # fmt: skip


def template(name: str, **more: Any) -> ChatTemplate:
    return ChatTemplate(SOURCES[name], TOKENS, end_tokens=ENDS, **more)


@pytest.fixture(scope="module", params=SOURCES)
def pair(request: pytest.FixtureRequest) -> Iterator[tuple[ChatTemplate, ChatTemplate]]:
    """A template that learns shapes, and the same one that looks at all in full."""
    knows, looks = template(request.param), template(request.param)
    yield knows, looks
    knows.close()
    looks.close()


def conversation(contents: list[str]) -> Messages:
    return say(*contents[: len(contents) // 2 * 2])


@settings(max_examples=40, deadline=None)
@given(st.lists(TALKS, min_size=3, max_size=5))
def test_known_spans_are_those_of_a_look_in_full(
    pair: tuple[ChatTemplate, ChatTemplate], talks: list[list[str]]
) -> None:
    knows, looks = pair
    conversations = [conversation(talk) for talk in talks]
    for messages in conversations[:2]:
        try:
            knows.locate(messages)
        except Exception:
            continue  # whatever is wrong with it teaches nothing
    for messages, known in zip(conversations, knows.locate_known(conversations), strict=True):
        if known is not None:
            full = looks.locate(messages)
            assert (known.text, known.spans, known.left_out) == (full.text, full.spans, {})


@pytest.mark.parametrize("name", [*FAMILIES, "tagged"])
def test_a_shape_is_known_after_two_conversations_that_agree(name: str) -> None:
    knows = template(name)
    third = say("What is it?", "This is #3.\n\nReally.")
    for talk in (say("One?", "First."), say("Two?", "Second one.")):
        assert knows.locate_known([third]) == [None]
        knows.locate(talk)
    (known,) = knows.locate_known([third])
    assert known is not None
    assert known.text == knows.render(third)
    ((start, end),) = known.spans
    assert "This is #3.\n\nReally." in known.text[start:end]
    other = say("What is it?", "Really.", "And now?", "Now.")
    flagged: Messages = [third[0], {**third[1], "train": True}]
    assert knows.locate_known([other, flagged, []]) == [None, None, None]
    assert knows.locate_known([third], enable_thinking=False) == [None]
    knows.close()


def test_what_a_template_looks_for_is_looked_at_in_full() -> None:
    knows = template("counts")
    knows.locate(say("a", "b"))
    knows.locate(say("c", "d"))
    assert knows.locate_known([say("e", "f")])[0] is not None
    # Another number than the learnt 1 stands behind the text: the rendering is another.
    assert knows.locate_known([say("e", "two")]) == [None]
    for telling in ("<tool_call>", "[INST]", "x<|im_end|>y", " spaced", "ended\n", ""):
        assert knows.locate_known([say("e", telling)]) == [None]
    knows.close()


def test_one_conversation_beyond_the_limits_leaves_all_to_a_look_in_full() -> None:
    source = PLAIN + "{% if 'burn' in messages[0]['content'] %}{% for i in range(99999) %}" \
        "{% for j in range(99999) %}{% endfor %}{% endfor %}{% endif %}"  # fmt: skip
    knows = ChatTemplate(source, TOKENS, end_tokens=ENDS, limits=Limits(cpu_seconds=1))
    knows.locate(say("a", "b"))
    knows.locate(say("c", "d"))
    assert knows.locate_known([say("e", "f"), say("burn", "f")]) == [None, None]
    assert knows.locate_known([say("e", "f")])[0] is not None
    knows.close()
