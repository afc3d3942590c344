"""Find the loss spans of a rendered conversation.

These are, for every assistant message that contributes, what the model itself would write: the text
after the generation prompt up to and including the end-of-turn token, and nothing after it.

The conversation is rendered once as it is and once with markers in what its messages say (see
`markers`); the markers of an answer tell its part of the text. What stands around the markers is
compared with renderings of the conversation's beginning (see `turn_edges`): once for every kind of
turn, however many turns there are. So the cost is linear in the length of the conversation.

Where a template marks what the model writes with `{% generation %}`, the spans are what its tags
and the answers' parts have in common; a role header inside the tags is not trained.

Token ids are never looked at: a padding token that equals the end token changes nothing here.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

from engine.tokenization.known_shapes import KnownShapes
from engine.tokenization.marked_text import MarkedText, missing, read_marked
from engine.tokenization.markers import Marking, mark
from engine.tokenization.messages import ConversationError, contributes_to_loss, has_text
from engine.tokenization.sandbox import Job, Rendered, TemplateInput
from engine.tokenization.turn_edges import EdgeFinder, EndTokens, Span, past_space

Render = Callable[[TemplateInput, list[Job]], list[Rendered]]

_ADVICE = (
    "Put {% generation %} and {% endgeneration %} around what the assistant writes in the "
    "chat template, end-of-turn token included."
)


@dataclass(frozen=True)
class LocatedTurns:
    """A rendered conversation.

    Attributes:
        text: as the model reads it.
        spans: what is trained, as [start, end) of characters, in order.
        left_out: what messages say and the template does not show: 'content', 'reasoning',
            'name' or 'argument' (of tool calls), 'system', for each message that lacks something;
            'result' (of tools), where rows are rendered.
        ignores_tools: whether the text is the same without the tools that were given.
    """

    text: str
    spans: list[Span]
    left_out: Mapping[int, set[str]] = field(default_factory=dict)
    ignores_tools: bool = False


class SpanFinder:
    """Finds loss spans for one template.

    Args:
        source: the template's text.
        end_tokens: texts of the tokens that may end a turn.
    """

    def __init__(self, source: str, end_tokens: Sequence[str]) -> None:
        self.tagged = re.search(r"\{%[-+]?\s*generation\s*[-+]?%\}", source) is not None
        self._has_prompt = "add_generation_prompt" in source
        self._ends = EndTokens(end_tokens)
        self.shapes = KnownShapes(self._ends)

    def end_after(self, text: str, start: int) -> int:
        """The index behind the first end-of-turn token from `start` on, or the end of the text."""
        match = self._ends.pattern.search(text, start)
        return match.end() if match is not None else len(text)

    def find(self, conversation: TemplateInput, render: Render) -> LocatedTurns:
        """Render a conversation and find what is trained in it.

        Args:
            conversation: what the template is given.
            render: does jobs on a conversation.

        Raises:
            ConversationError: the template refuses the conversation, or hides where a trained
                message stands or ends.
        """
        messages = conversation.messages
        turns = [index for index, message in enumerate(messages) if contributes_to_loss(message)]
        for marking in Marking:
            marked = mark(messages, marking)
            given = replace(conversation, marked=marked.messages)
            edges = EdgeFinder(messages, turns, marked, self._ends, self._has_prompt)
            count = len(messages)
            jobs = [Job(count), Job(count, marked=True), *edges.jobs()]
            if conversation.tools:
                jobs.append(Job(count, with_tools=False))
            whole, shown, *parts = render(given, jobs)
            if whole.error is not None:
                raise _refused(whole.error)
            text = read_marked(shown.text, marked)
            if shown.error is None and text.plain == whole.text:
                break
        else:
            if not self.tagged:
                raise _lost(turns[0])
            return LocatedTurns(whole.text, self._by_order(messages, whole))
        ignores_tools = bool(conversation.tools) and parts.pop().text == whole.text
        edges.compare(text, parts, lambda jobs: render(given, jobs))
        left_out = missing(text, marked)
        for turn in turns:
            _refuse_hidden(turn, messages[turn], turn in text.turns, left_out.get(turn, set()))
        spans = self._by_tags(whole, text, turns, edges) if self.tagged else []
        if not self.tagged:
            spans = [_span(turn, text, edges) for turn in turns]
        if any(before[1] > after[0] for before, after in pairwise(spans)):
            raise _mixed()
        if marking == Marking.FULL and not left_out:
            self.shapes.learn(conversation, whole, text, spans)
        return LocatedTurns(whole.text, spans, left_out, ignores_tools)

    def _by_tags(
        self, whole: Rendered, text: MarkedText, turns: Sequence[int], edges: EdgeFinder
    ) -> list[Span]:
        """What the template's tags enclose of the turns that contribute."""
        spans: list[Span] = []
        tags = sorted(whole.spans)
        number = 0
        for turn in turns:
            first = text.start(turn) if turn in text.turns else len(text.plain)
            start = edges.starts.get(turn, first)
            end = edges.ends.get(turn, text.end(turn) if turn in text.turns else start)
            own: list[Span] = []
            while number < len(tags) and tags[number][0] < max(end, start + 1):
                own.append((max(start, tags[number][0]), tags[number][1]))
                number += 1
            own = _joined([(a, b) for a, b in own if a < b])
            if own:
                last = self._close(whole.text, *own.pop(), edges.ends.get(turn, 0))
                spans += [(a, self._trim(whole.text, a, b)) for a, b in own] + [last]
        if not spans:
            raise ConversationError(
                "The chat template's generation tags enclose nothing in this conversation. "
                + _ADVICE
            )
        return spans

    def _by_order(self, messages: Sequence[Mapping[str, Any]], whole: Rendered) -> list[Span]:
        """What the tags enclose, where the turns cannot be found: one tag for each, in order."""
        spans = list(whole.spans)
        answers = [message for message in messages if message["role"] == "assistant"]
        if len(spans) != len(answers):
            raise ConversationError(
                f"The chat template marks {len(spans)} generated parts for {len(answers)} "
                f"assistant messages, and changes what they say, so that their parts cannot be "
                f"told apart. {_ADVICE}"
            )
        return [
            self._close(whole.text, *span)
            for span, message in zip(spans, answers, strict=True)
            if contributes_to_loss(message)
        ]

    def _trim(self, text: str, start: int, end: int) -> int:
        """The end of a span, without white space behind an end-of-turn token."""
        inside = len(text[start:end].rstrip()) + start
        return inside if text.endswith(self._ends.texts, start, inside) else end

    def _close(self, text: str, start: int, end: int, known: int = 0) -> Span:
        """Move the end of a span to just behind its end-of-turn token, `known` if that is near."""
        if known >= end and not self._ends.pattern.sub("", text[end:known]).strip():
            return start, known
        inside = start + len(text[start:end].rstrip())
        if text.endswith(self._ends.texts, start, inside) and inside > start:
            return start, inside
        match = self._ends.pattern.match(text, past_space(text, end))
        if match is None:
            raise _unended(text, start, end)
        return start, match.end()


def _joined(spans: Sequence[Span]) -> list[Span]:
    """Spans in order, those that touch as one."""
    result: list[Span] = []
    for start, end in spans:
        if result and result[-1][1] == start:
            result[-1] = (result[-1][0], end)
        else:
            result.append((start, end))
    return result


def _span(turn: int, text: MarkedText, edges: EdgeFinder) -> Span:
    if turn in text.unclear or turn not in edges.starts:
        raise _lost(turn)
    start = edges.starts[turn]
    if edges.ends.get(turn, 0) <= start:
        raise _unended(text.plain, start, text.end(turn) if turn in text.turns else start)
    return start, edges.ends[turn]


def _refuse_hidden(turn: int, message: Mapping[str, Any], shown: bool, left_out: set[str]) -> None:
    """Refuse a template that leaves out what a message says: only its end would contribute."""
    calls = message.get("tool_calls")
    if (calls or has_text(message.get("content"))) and not shown:
        raise ConversationError(
            f"The chat template leaves out what messages[{turn}] says, so that only its "
            "end would be learnt. Use a template that knows this kind of message."
        )
    if calls and "name" in left_out:
        raise ConversationError(
            f"The chat template leaves out the tool calls of messages[{turn}]. Use a "
            "template that knows tool calls, or remove the row."
        )


def _refused(complaint: str) -> ConversationError:
    return ConversationError(
        f"The chat template refuses the conversation: {complaint}. Change the messages "
        "to the order and roles that the model's template knows, or remove the row."
    )


def _mixed() -> ConversationError:
    return ConversationError(f"The chat template mixes the turns with each other. {_ADVICE}")


def _lost(turn: int) -> ConversationError:
    return ConversationError(
        f"The chat template changes messages[{turn}] so much that its part of the text cannot be "
        f"found. {_ADVICE}"
    )


def _unended(text: str, start: int, end: int) -> ConversationError:
    shown = text[max(start, end - 30) : end + 30]
    return ConversationError(
        f"The chat template ends an assistant turn with no end-of-turn token (at "
        f"{shown!r}), so the model would never learn to stop. {_ADVICE}"
    )
