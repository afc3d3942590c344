"""Real chat templates: texts equal transformers', and the spans are what the model must write.

The templates come with the packages `trl` and `llama-cpp-python` (llama.cpp's own collection) and
are not part of this repository. Three programs that share nothing with `engine.tokenization` judge
the spans: comparing the rendered beginnings of a conversation, the `{% generation %}` marks of
TRL's training templates, and the words of the messages.
"""

import re
import sys
from collections.abc import Callable, Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from engine.errors import DataError
from engine.tokenization.chat_template import ChatTemplate
from tests.interop.tokenization.conversations import CHATS, Chat, Messages

pytestmark = pytest.mark.interop

NAMED = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"}
KWARGS: tuple[dict[str, Any], ...] = ({}, {"enable_thinking": False}, {"enable_thinking": True})
SPECIAL = re.compile(
    r"<[|｜][^<>|｜\s]{1,40}[|｜]>|</s>|\[/?[A-Z_]{3,20}\]|<[a-z_]{2,20}\|>|<\|[a-z_]{2,20}>"
    r"|<(?:start|end)_of_(?:turn|sentence)>|<seed:[a-z]+>|<SPECIAL_\d+>"
)
"""Texts of a template that its tokenizer may have as special tokens."""


def find_templates() -> dict[str, Path]:
    """The templates of both packages by name."""
    spec = find_spec("trl")
    folders = {"llama.cpp": Path(sys.prefix) / "share" / "llama-cpp"}
    if spec is not None and spec.submodule_search_locations is not None:
        folders["trl"] = Path(spec.submodule_search_locations[0]) / "chat_templates"
    return {
        f"{package}/{file.stem}": file
        for package, folder in folders.items()
        for file in sorted(folder.glob("*.jinja"))
    }


TEMPLATES = find_templates()
ALWAYS_OPEN = ("llama.cpp/CohereForAI-c4ai-command-r7b-12-2024-tool_use",)
"""Templates that write the generation prompt whether it is asked for or not."""
ANY_TEMPLATE = pytest.mark.parametrize("name", sorted(TEMPLATES))


@cache
def source(name: str) -> str:
    return TEMPLATES[name].read_text()


def settings_of(name: str) -> tuple[dict[str, Any], ...]:
    """The variables that the template is given; one that does not read them needs no second try."""
    return KWARGS if "enable_thinking" in source(name) else KWARGS[:1]


@cache
def end_tokens(name: str) -> tuple[str, ...]:
    return tuple(sorted({*SPECIAL.findall(source(name)), "</s>"}))


@pytest.fixture
def ours(request: pytest.FixtureRequest) -> Iterator[Callable[[str], ChatTemplate]]:
    """``ours(name)`` makes one template, closed after the test."""
    made: list[ChatTemplate] = []

    def make(name: str) -> ChatTemplate:
        made.append(ChatTemplate(source(name), NAMED, end_tokens=end_tokens(name)))
        return made[-1]

    yield make
    for template in made:
        template.close()


def theirs(
    name: str, messages: Messages, tools: Any, prompt: bool = False, **kwargs: Any
) -> str | None:
    """transformers' text, or None where the template refuses."""
    rendered = _theirs(name, messages, tools, prompt, kwargs)
    return None if rendered is None else rendered[0]


def _theirs(
    name: str, messages: Messages, tools: Any, prompt: bool, kwargs: dict[str, Any]
) -> tuple[str, list[tuple[int, int]]] | None:
    # As apply_chat_template does before it renders.
    given = [{k: v for k, v in message.items() if v is not None} for message in messages]
    try:
        texts, marks = render_jinja_template(
            conversations=[given],
            tools=tools,
            chat_template=source(name),
            add_generation_prompt=prompt,
            return_assistant_tokens_mask=True,
            **{**NAMED, **kwargs},
        )
    except Exception:
        return None
    return texts[0], marks[0]


def test_the_templates_are_there() -> None:
    advice = "make interop fetches them: pip install --no-deps trl, pip download llama-cpp-python"
    assert len(TEMPLATES) >= 130, advice
    assert len(CHATS) >= 28


@ANY_TEMPLATE
def test_texts_equal_those_of_transformers(name: str, ours: Callable[[str], ChatTemplate]) -> None:
    template = ours(name)
    for title, chat in CHATS.items():
        for prompt in (False, True):
            for kwargs in settings_of(name):
                expected = theirs(name, chat.messages, chat.tools, prompt, **kwargs)
                try:
                    text = template.render(chat.messages, prompt, tools=chat.tools, **kwargs)
                except DataError:
                    text = None
                assert text == expected, (title, prompt, kwargs)


def trained(template: ChatTemplate, chat: Chat, **kwargs: Any) -> tuple[str, list[Any]] | None:
    """Text and spans, or None for a row that is refused."""
    try:
        located = template.locate(chat.messages, tools=chat.tools, **kwargs)
        return located.text, located.spans
    except DataError:
        return None


def turns_of(chat: Chat) -> list[int]:
    return [
        index
        for index, message in enumerate(chat.messages)
        if message["role"] == "assistant" and message.get("weight") != 0
    ]


def check_spans(
    name: str, chat: Chat, kwargs: dict[str, Any], text: str, spans: list[tuple[int, int]]
) -> None:
    """Compare spans with the rendered beginnings of the conversation, where they begin its text."""
    for turn, (start, end) in zip(turns_of(chat), spans, strict=True):
        told = (chat, kwargs, text[start:end])
        begun = chat.messages[:turn]
        bare = theirs(name, begun, chat.tools, **kwargs)
        before = theirs(name, begun, chat.tools, True, **kwargs)
        if before is not None and before != bare and text.startswith(before):
            assert start == len(before), told
        after = theirs(name, chat.messages[: turn + 1], chat.tools, **kwargs)
        closed = (after or "").rstrip()
        if (
            closed
            and name not in ALWAYS_OPEN
            and text.startswith(closed)
            and closed.endswith(end_tokens(name))
        ):
            assert end == len(closed), told


@ANY_TEMPLATE
def test_spans_are_what_follows_the_rendered_beginning(
    name: str, ours: Callable[[str], ChatTemplate]
) -> None:
    """Where messages[:i] with the prompt begin the text, so does the span end that beginning."""
    if "{% generation" in source(name) or "{%- generation" in source(name):
        pytest.skip("marks decide; another test has them")
    template = ours(name)
    for chat in CHATS.values():
        for kwargs in settings_of(name):
            made = trained(template, chat, **kwargs)
            if made is None:
                continue
            check_spans(name, chat, kwargs, *made)


@ANY_TEMPLATE
def test_spans_hold_the_words_of_their_turns_and_no_others(
    name: str, ours: Callable[[str], ChatTemplate]
) -> None:
    template = ours(name)
    ends = end_tokens(name)
    for title, chat in CHATS.items():
        made = trained(template, chat) if chat.distinct else None
        if made is None:
            continue
        text, spans = made
        covered = "\0".join(text[start:end] for start, end in spans)
        for index, message in enumerate(chat.messages):
            content = message.get("content")
            if not isinstance(content, str) or not content.strip():
                continue
            word = content.split("</think>")[-1].split()[-1]
            assert (word in covered) == (index in turns_of(chat) and word in text), (title, word)
        for start, end in spans:
            assert text[start:end].endswith(ends) or text[end:].lstrip() == "", title
            assert text[start:end].strip(), title


PAIRS = [name for name in TEMPLATES if f"{name}_training" in TEMPLATES and name.startswith("trl/")]


@pytest.mark.parametrize("name", PAIRS)
def test_spans_are_what_trl_trains(name: str, ours: Callable[[str], ChatTemplate]) -> None:
    """TRL's patched templates mark what the model writes, but for what the prompt supplies."""
    template = ours(name)
    compared = 0
    for title, chat in CHATS.items():
        made = trained(template, chat)
        marked = _theirs(f"{name}_training", chat.messages, chat.tools, False, {})
        if made is None or marked is None or marked[0] != made[0] or title == "untrained turn":
            continue
        text, spans = made
        own = {at for start, end in spans for at in range(start, end)}
        peer = {at for start, end in marked[1] for at in range(start, end)}
        for start, end in spans:
            body = text[start:end]
            extra = [at for at in range(start, end) if at not in peer]
            # TRL leaves some end-of-turn tokens out, which the model would then never learn.
            assert not "".join(text[at] for at in extra).strip() or all(
                at >= start + len(body) - len(body[body.rfind("<") :]) for at in extra
            ), (title, body)
        prompts = [prompt_of(name, chat, turn) for turn in turns_of(chat)]
        for run in runs(peer - own):
            shown = "".join(text[at] for at in run).strip()
            assert any(shown in prompt for prompt in prompts), (title, shown)
        compared += len(spans)
    assert compared > 0 or "gemma4" in name or "idefics" in name or "smolvlm" in name


def prompt_of(name: str, chat: Chat, turn: int) -> str:
    """What transformers adds before a turn when it is asked for a generation prompt."""
    bare = theirs(name, chat.messages[:turn], chat.tools) or ""
    before = theirs(name, chat.messages[:turn], chat.tools, True) or ""
    return before.removeprefix(bare.rstrip()).lstrip()


def runs(characters: set[int]) -> list[list[int]]:
    """Indices in order, those that follow each other together."""
    result: list[list[int]] = []
    for at in sorted(characters):
        if result and result[-1][-1] == at - 1:
            result[-1].append(at)
        else:
            result.append([at])
    return result
