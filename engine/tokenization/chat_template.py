"""Chat templates: render messages and give their loss spans.

The text equals what Hugging Face's `apply_chat_template(tokenize=False)` gives. Rendering happens
in a process of its own (see `sandbox_worker`), because a template is a program that came with
somebody else's model.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2

from engine.errors import DataError
from engine.tokenization.loss_spans import LocatedTurns, SpanFinder
from engine.tokenization.messages import REASONING_KEYS, ConversationError
from engine.tokenization.sandbox import (
    MAX_SOURCE_BYTES,
    Job,
    Limits,
    TemplateInput,
    TemplateProcess,
)
from engine.tokenization.turn_edges import Span

CHATML = """\
{%- for message in messages %}
{{- '<|im_start|>' + message['role'] + '\\n' }}
{%- if message['role'] == 'assistant' %}
{%- generation %}{{- message['content'] + '<|im_end|>' }}{%- endgeneration %}
{%- else %}
{{- message['content'] + '<|im_end|>' }}
{%- endif %}
{{- '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
"""Used for a tokenizer that has `<|im_start|>` and `<|im_end|>` but no template."""

PLAIN = """\
{{- bos_token }}
{%- for message in messages %}
{%- if message['role'] == 'assistant' %}
{%- generation %}{{- message['content'] + eos_token }}{%- endgeneration %}
{%- if not loop.last %}{{- '\\n' }}{%- endif %}
{%- else %}
{{- message['content'] + '\\n' }}
{%- endif %}
{%- endfor %}
"""
"""Used for any other tokenizer without a template: prompt, line break, response, end token."""

DEFAULT, TOOL_USE = "default", "tool_use"
"""Names of the templates of a model that has several; the second is for rows with tools."""

_OLDEST_JINJA = (3, 1, 6)


class ChatTemplate:
    """One chat template, ready to render.

    Args:
        source: the template in Jinja's language.
        special_tokens: named special tokens (`bos_token`, `eos_token`, ...); variables of the
            template.
        end_tokens: texts of the tokens that may end a turn; by default all `special_tokens` but
            the BOS token.
        name: what errors call the template.
        limits: what one rendering may use.
        now: date and time in ISO form that `strftime_now` gives; by default the present.
        for_tools: the source of the template for conversations with tools, where a model has one
            of its own for them.

    Raises:
        DataError: the template is too large, or jinja2 is too old to run it safely. A template
            that is not valid is noticed when it first renders.
    """

    def __init__(
        self,
        source: str,
        special_tokens: Mapping[str, str] | None = None,
        *,
        end_tokens: Sequence[str] = (),
        name: str = "The chat template",
        limits: Limits | None = None,
        now: str | None = None,
        for_tools: str | None = None,
    ) -> None:
        if len(source.encode(errors="replace")) > MAX_SOURCE_BYTES:
            raise DataError(
                f"{name} is larger than {MAX_SOURCE_BYTES >> 10} KiB, and no real template is; "
                "check that the right file was given."
            )
        if _jinja_version() < _OLDEST_JINJA:
            raise DataError(
                f"jinja2 {jinja2.__version__} has known ways out of its sandbox, and chat "
                "templates are other people's programs. Install jinja2>=3.1.6."
            )
        self.source, self.now = source, now
        self.special_tokens = dict(special_tokens or {})
        ends = end_tokens or _default_ends(self.special_tokens)
        self._finder = SpanFinder(source, ends)
        self._process = TemplateProcess(source, self.special_tokens, limits or Limits(), name, now)
        self._for_tools: ChatTemplate | None = None
        if for_tools is not None:
            self._for_tools = ChatTemplate(
                for_tools,
                special_tokens,
                end_tokens=end_tokens,
                name=f"{name} for tools",
                limits=limits,
                now=now,
            )

    @property
    def reads_clock(self) -> bool:
        """Whether the template may write the date or the time."""
        return any("strftime_now" in source for source in self.sources)

    @property
    def sources(self) -> tuple[str, ...]:
        """The sources of the template and of the one for tools, where there is one."""
        return (self.source, *(self._for_tools.sources if self._for_tools else ()))

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = False,
        *,
        tools: list[dict[str, Any]] | None = None,
        **kwargs: Any,
    ) -> str:
        """The conversation as the model reads it.

        Args:
            messages: mappings with `role` and `content`.
            add_generation_prompt: end with the beginning of an assistant turn.
            tools: JSON schemas of callable tools.
            kwargs: further variables of the template, such as `enable_thinking`.

        Raises:
            ConversationError: the template refuses this conversation.
            DataError: the template is not valid or was stopped.
        """
        if tools is not None and self._for_tools is not None:
            return self._for_tools.render(messages, add_generation_prompt, tools=tools, **kwargs)
        plain = plain_messages(messages)
        job = Job(len(plain), add_generation_prompt)
        rendered = self._process.render(TemplateInput(plain, tools, kwargs), [job])[0]
        if rendered.error is not None:
            raise ConversationError(
                f"The chat template refuses the conversation: {rendered.error}. Change the "
                "messages to the order and roles that the model's template knows."
            )
        return rendered.text

    def locate(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: list[dict[str, Any]] | None = None,
        **kwargs: Any,
    ) -> LocatedTurns:
        """Render a conversation and find what is trained in it.

        Every span ends with its end-of-turn token. See `loss_spans`.

        Raises:
            ConversationError: the template refuses this conversation, or does not show where a
                trained message stands and ends.
            DataError: the template is not valid or was stopped.
        """
        if tools is not None and self._for_tools is not None:
            return self._for_tools.locate(messages, tools=tools, **kwargs)
        conversation = TemplateInput(plain_messages(messages), tools, kwargs)
        return self._finder.find(conversation, self._process.render)

    def locate_known(
        self, conversations: Sequence[Sequence[Mapping[str, Any]]], **kwargs: Any
    ) -> list[LocatedTurns | None]:
        """What `locate` gives of conversations without tools, where their shape tells it.

        All are rendered in one request. None of those that `locate` must look at in full, which is
        for it to do: among them those that the template refuses.
        """
        given = [
            TemplateInput(plain_messages(messages), None, kwargs) for messages in conversations
        ]
        expected = [self._finder.shapes.expected(conversation) for conversation in given]
        wanted = [index for index, known in enumerate(expected) if known is not None]
        rendered = self._process.render_each([given[index] for index in wanted])
        result: list[LocatedTurns | None] = [None] * len(given)
        for index, text in zip(wanted, rendered, strict=True):
            known = expected[index]
            if known is not None and text is not None and known.agrees(text):
                result[index] = LocatedTurns(known.text, known.spans)
        return result

    def locate_after(
        self,
        messages: Sequence[Mapping[str, Any]],
        marker: str,
        *,
        tools: list[dict[str, Any]] | None = None,
        **kwargs: Any,
    ) -> LocatedTurns:
        """Render a conversation; what follows each `marker` to the end of its turn is trained.

        Raises as `render`, and `ConversationError` where the text does not hold the marker.
        """
        text = self.render(messages, tools=tools, **kwargs)
        spans = self.spans_after(text, marker)
        if not spans:
            raise ConversationError(
                f"The rendered conversation does not hold {marker!r}, after which --train-on says "
                f"that it is trained: {text[:200]!r}. Look at a row with `engine data preview`."
            )
        return LocatedTurns(text, spans)

    def spans_after(self, text: str, marker: str) -> list[Span]:
        """What follows each `marker` in a text, up to and including the next end-of-turn token."""
        spans: list[Span] = []
        start = text.find(marker)
        while start >= 0:
            end = self._finder.end_after(text, start + len(marker))
            if end > start + len(marker):
                spans.append((start + len(marker), end))
            start = text.find(marker, end)
        return spans

    def close(self) -> None:
        """End the helper process; rendering again starts a new one."""
        self._process.close()
        if self._for_tools is not None:
            self._for_tools.close()


def plain_messages(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Messages as templates expect them, as Hugging Face prepares them.

    Keys without a value are dropped, and a reasoning text stands under each of the names that
    templates look for.
    """
    result = []
    for message in messages:
        plain = {key: value for key, value in message.items() if value is not None}
        reasoning = next((plain[key] for key in REASONING_KEYS if key in plain), None)
        if reasoning is not None:
            plain = {"thinking": reasoning, **plain, "reasoning_content": reasoning}
        result.append(plain)
    return result


def default_template(tokens: Mapping[str, int], has_bos: bool) -> str:
    """The template for a tokenizer that brings none.

    Args:
        tokens: token texts of the vocabulary.
        has_bos: whether the tokenizer itself puts a BOS token before a text.
    """
    if "<|im_start|>" in tokens and "<|im_end|>" in tokens:
        return CHATML
    return PLAIN if has_bos else PLAIN.replace("{{- bos_token }}\n", "")


def _default_ends(special_tokens: Mapping[str, str]) -> list[str]:
    bos, eos = special_tokens.get("bos_token"), special_tokens.get("eos_token")
    return [token for token in special_tokens.values() if token != bos or token == eos]


def _jinja_version() -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", jinja2.__version__)[:3])
