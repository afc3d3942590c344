"""Find the loss spans of a rendered conversation.

These are, for every assistant message that contributes, what the model itself would write: the text
after the generation prompt up to and including the end-of-turn token, and nothing after it. Three
methods, in order of preference:

1. The template marks it with `{% generation %}`.
2. Prefixes: messages[:i] with the generation prompt give the start, messages[:i+1] the end, if
   both texts are prefixes of the whole.
3. A stand-in: what the message says is exchanged for a marker; what stands before and after the
   marker is compared with the whole text. This serves templates that treat the last turn
   differently (Qwen3 drops earlier reasoning) or have no generation prompt (Mistral).

Token ids are never looked at: a padding token that equals the end token changes nothing here.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

from engine.errors import DataError
from engine.tokenization.messages import contributes_to_loss, has_text
from engine.tokenization.sandbox import Job, Rendered

Span = tuple[int, int]
Render = Callable[[list[Job]], list[Rendered]]

_ADVICE = (
    "Put {% generation %} and {% endgeneration %} around what the assistant writes in the "
    "chat template, end-of-turn token included."
)


class ConversationError(DataError):
    """One conversation does not fit the chat template; others may."""


class SpanFinder:
    """Finds loss spans for one template.

    Args:
        source: the template's text.
        end_tokens: texts of the tokens that may end a turn.
    """

    def __init__(self, source: str, end_tokens: Sequence[str]) -> None:
        self.tagged = re.search(r"\{%[-+]?\s*generation\s*[-+]?%\}", source) is not None
        self._has_generation_prompt = "add_generation_prompt" in source
        # Longest first: where one token is the beginning of another, the longer one is meant.
        self._ends = tuple(sorted({t for t in end_tokens if t}, key=lambda t: (-len(t), t)))
        self._end_pattern = re.compile("|".join(map(re.escape, self._ends)) or r"(?!)")

    def find(self, messages: Sequence[Mapping[str, Any]], render: Render) -> tuple[str, list[Span]]:
        """Render a conversation and find what is trained in it.

        Args:
            messages: the conversation.
            render: does jobs on the same conversation.

        Returns:
            the whole text, and the loss spans in order, as [start, end) of characters.

        Raises:
            ConversationError: the template refuses the conversation, or hides where a trained
                message stands or ends.
        """
        if self.tagged:
            whole = _whole(render([Job(len(messages))])[0])
            spans = _tagged_spans(messages, whole)
        else:
            whole, spans = self._untagged(messages, render)
        closed = [self._close(whole.text, *span) for span in spans]
        self._refuse_hidden(messages, whole.text, closed)
        if any(before[1] > after[0] for before, after in pairwise(closed)):
            raise ConversationError(f"The chat template mixes the turns with each other. {_ADVICE}")
        return whole.text, closed

    def _untagged(
        self, messages: Sequence[Mapping[str, Any]], render: Render
    ) -> tuple[Rendered, list[Span]]:
        count = len(messages)
        turns = [index for index, message in enumerate(messages) if contributes_to_loss(message)]
        jobs = [Job(turn, generation_prompt=True) for turn in turns]
        jobs += [Job(turn + 1) for turn in turns if turn + 1 < count]
        whole, *parts = render([Job(count), *jobs])
        text = _whole(whole).text
        befores, afters = parts[: len(turns)], [*parts[len(turns) :], whole]
        spans: list[Span] = []
        for turn, before, after in zip(turns, befores, afters, strict=False):
            start = len(before.text) if self._is_start(before, text) else None
            end = len(after.text) if after.error is None and text.startswith(after.text) else None
            if start is None or end is None or end <= start:
                start, end = self._by_stand_in(messages, turn, text, (start, end), render)
            spans.append((start, end))
        return whole, spans

    def _is_start(self, before: Rendered, text: str) -> bool:
        return (
            self._has_generation_prompt
            and before.error is None
            and bool(before.text)
            and text.startswith(before.text)
        )

    def _by_stand_in(
        self,
        messages: Sequence[Mapping[str, Any]],
        turn: int,
        text: str,
        known: tuple[int | None, int | None],
        render: Render,
    ) -> Span:
        """Method 3 of the module's docstring for one message; `known` is what method 2 gave."""
        marker = _marker(text)
        counts = dict.fromkeys((len(messages), turn + 1))
        swapped = render([Job(count, replace=(turn, marker)) for count in counts])
        around = [_around(rendered, marker) for rendered in swapped]
        start, end = known
        if start is None:
            # Where following tool results cannot do without the call, the shorter text serves.
            head = next((head for head, tail in around if tail is not None), None)
            start = None if head is None else _agreed(head, text)
        if start is None:
            raise _lost(turn)
        if end is None or end <= start:
            end = self._end_in_tail(text, around[0][1])
        if end is None or end <= start:
            raise _unended(turn)
        return start, end

    def _end_in_tail(self, text: str, tail: str | None) -> int | None:
        """Where a turn ends in `text`, of which `tail` is what follows the turn's content."""
        match = None if tail is None else self._end_pattern.match(tail.lstrip())
        if tail is None or match is None:
            return None
        rest = tail.lstrip()[match.end() :]
        return len(text) - len(rest) if text.endswith(rest) else None

    def _refuse_hidden(
        self, messages: Sequence[Mapping[str, Any]], text: str, spans: Sequence[Span]
    ) -> None:
        """Refuse a template that leaves out what a message says: only its end would contribute."""
        turns = [index for index, message in enumerate(messages) if contributes_to_loss(message)]
        if len(turns) != len(spans):
            return
        for turn, (start, end) in zip(turns, spans, strict=True):
            message, shown = messages[turn], text[start:end]
            words = self._end_pattern.sub("", shown).strip()
            calls = message.get("tool_calls") or ()
            if (calls or has_text(message.get("content"))) and not words:
                raise ConversationError(
                    f"The chat template leaves out what messages[{turn}] says, so that only its "
                    "end would be learnt. Use a template that knows this kind of message."
                )
            if not all(_call_name(call) in shown for call in calls):
                raise ConversationError(
                    f"The chat template leaves out the tool calls of messages[{turn}]. Use a "
                    "template that knows tool calls, or remove the row."
                )

    def _close(self, text: str, start: int, end: int) -> Span:
        """Move the end of a span to just behind its end-of-turn token."""
        inside = len(text[:end].rstrip())
        if text.endswith(self._ends, start, inside) and inside > start:
            return start, inside
        behind = end + len(text[end:]) - len(text[end:].lstrip())
        match = self._end_pattern.match(text, behind)
        if match is None:
            shown = text[max(start, end - 30) : end + 30]
            raise ConversationError(
                f"The chat template ends an assistant turn with no end-of-turn token (at "
                f"{shown!r}), so the model would never learn to stop. {_ADVICE}"
            )
        return start, match.end()


def _call_name(call: Any) -> str:
    function = call.get("function", call) if isinstance(call, Mapping) else {}
    return str(function.get("name", ""))


def _whole(rendered: Rendered) -> Rendered:
    if rendered.error is not None:
        raise ConversationError(
            f"The chat template refuses the conversation: {rendered.error}. Change the messages "
            "to the order and roles that the model's template knows, or remove the row."
        )
    return rendered


def _tagged_spans(messages: Sequence[Mapping[str, Any]], whole: Rendered) -> list[Span]:
    spans = list(whole.spans)
    answers = [message for message in messages if message["role"] == "assistant"]
    untrained = [not contributes_to_loss(message) for message in answers]
    if any(untrained):
        if len(spans) != len(answers):
            raise ConversationError(
                f"The chat template marks {len(spans)} generated parts for {len(answers)} "
                "assistant messages, so those with weight 0 cannot be told from the others."
            )
        spans = [span for span, skip in zip(spans, untrained, strict=True) if not skip]
    if not spans:
        raise ConversationError(
            "The chat template's generation tags enclose nothing in this conversation. " + _ADVICE
        )
    return spans


def _marker(text: str) -> str:
    """A word that is not in the text and that no template takes for markup."""
    number = 0
    while (marker := f"standin{number}marker") in text:
        number += 1
    return marker


def _around(rendered: Rendered, marker: str) -> tuple[str, str | None]:
    """What stands before and after the marker; no tail unless it occurs exactly once."""
    head, separator, tail = rendered.text.partition(marker)
    usable = rendered.error is None and separator and marker not in tail
    return head, tail if usable else None


def _agreed(head: str, text: str) -> int | None:
    """Length of `head` if `text` begins with it, white space at its end aside."""
    if text.startswith(head):
        return len(head)
    start = len(head.rstrip())
    if not text.startswith(head[:start]):
        return None
    while start < len(text) and text[start] == head[start]:
        start += 1
    return start


def _lost(turn: int) -> ConversationError:
    return ConversationError(
        f"The chat template changes messages[{turn}] so much that its part of the text cannot be "
        f"found. {_ADVICE}"
    )


def _unended(turn: int) -> ConversationError:
    return ConversationError(
        f"The chat template ends messages[{turn}] with no end-of-turn token, so the model would "
        f"never learn to stop. {_ADVICE}"
    )
