"""Loss spans of conversations of a known shape, from one rendering.

The shape of a conversation is who speaks in which order, with everything that is told of messages
but what they say. Of two conversations of one shape that were looked at in full, what the template
writes around the texts is noted, and where the spans begin and end among it. If it was the same for
both, the text of a third is put together, and rendered once to compare: where the rendering is that
text to the character, its spans are known.

Only plain texts are put together: without white space at their ends, and without anything that
looks like a tag or a special token, which a template may look for.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from engine.tokenization.marked_text import MarkedText
from engine.tokenization.sandbox import Rendered, TemplateInput
from engine.tokenization.turn_edges import EndTokens, Span

MOST_SHAPES = 512
_TELLING = re.compile(r"<[|/A-Za-z_]|\[/?[A-Z]{2}|◁")
_PLAIN_ROLES = frozenset(("system", "user", "assistant"))

Edge = tuple[int, int]
"""A position: characters behind the edge of a text, of which there are two for each message."""


@dataclass(frozen=True)
class Frame:
    """What stands around the texts of a shape.

    Attributes:
        gaps: before the first text, between two, and after the last.
        spans: what is trained.
        tags: what the template's generation tags enclose.
    """

    gaps: tuple[str, ...]
    spans: tuple[tuple[Edge, Edge], ...]
    tags: tuple[tuple[Edge, Edge], ...]


@dataclass(frozen=True)
class Expected:
    """A conversation as it is to be rendered if its shape tells all."""

    text: str
    spans: list[Span]
    tags: tuple[Span, ...]

    def agrees(self, rendered: Rendered) -> bool:
        """Whether the template wrote just that."""
        return (rendered.error, rendered.text, rendered.spans) == (None, self.text, self.tags)


class KnownShapes:
    """The shapes that one template was seen to render, and their frames.

    Args:
        ends: tokens that may end a turn.
    """

    def __init__(self, ends: EndTokens) -> None:
        self._ends = ends
        self._frames: dict[str, tuple[Frame | None, bool]] = {}

    def learn(
        self, given: TemplateInput, whole: Rendered, text: MarkedText, spans: Sequence[Span]
    ) -> None:
        """Note what a conversation that was looked at in full says of its shape."""
        shape = self._shape(given)
        if shape is None:
            return
        before, sure = self._frames.get(shape, (None, False))
        if sure or (shape not in self._frames and len(self._frames) >= MOST_SHAPES):
            return
        frame = _frame(given.messages, whole, [a.position for a in text.anchors], spans)
        if shape not in self._frames:
            self._frames[shape] = frame, frame is None
        else:
            self._frames[shape] = (frame if frame == before else None), True

    def expected(self, given: TemplateInput) -> Expected | None:
        """The conversation put together, if its shape is known."""
        shape = self._shape(given)
        frame, sure = (None, False) if shape is None else self._frames.get(shape, (None, False))
        if frame is None or not sure:
            return None
        pieces, edges, length = [frame.gaps[0]], list[int](), len(frame.gaps[0])
        for message, gap in zip(given.messages, frame.gaps[1:], strict=True):
            content = message["content"]
            edges += [length, length + len(content)]
            length += len(content) + len(gap)
            pieces += [content, gap]

        def spans(of: Sequence[tuple[Edge, Edge]]) -> list[Span]:
            return [(_position(edges, a), _position(edges, b)) for a, b in of]

        return Expected("".join(pieces), spans(frame.spans), tuple(spans(frame.tags)))

    def _shape(self, given: TemplateInput) -> str | None:
        """The shape of a conversation in plain words; None where it has other words, or tools."""
        told = []
        for message in given.messages:
            content = message.get("content")
            if (
                message["role"] not in _PLAIN_ROLES
                or not isinstance(content, str)
                or not content
                or content[:1].isspace()
                or content[-1:].isspace()
                or _TELLING.search(content)
                or self._ends.pattern.search(content)
            ):
                return None
            told.append({key: value for key, value in message.items() if key != "content"})
        if given.tools:
            return None
        try:
            return json.dumps([told, dict(given.kwargs)], sort_keys=True)
        except TypeError:
            return None


def _frame(
    messages: Sequence[Mapping[str, Any]],
    whole: Rendered,
    edges: list[int],
    spans: Sequence[Span],
) -> Frame | None:
    """What stands around the texts; None where they are not all there, in order and once."""
    if len(edges) != 2 * len(messages):
        return None
    text = whole.text
    for index, message in enumerate(messages):
        if text[edges[2 * index] : edges[2 * index + 1]] != message["content"]:
            return None
    bounds = [0, *edges, len(text)]
    gaps = tuple(text[bounds[i] : bounds[i + 1]] for i in range(0, len(bounds), 2))

    def relative(of: Sequence[Span]) -> tuple[tuple[Edge, Edge], ...]:
        return tuple((_edge(edges, a), _edge(edges, b)) for a, b in of)

    return Frame(gaps, relative(spans), relative(whole.spans))


def _edge(edges: list[int], position: int) -> Edge:
    number = bisect_right(edges, position) - 1
    return number, position - (edges[number] if number >= 0 else 0)


def _position(edges: list[int], edge: Edge) -> int:
    number, offset = edge
    return offset + (edges[number] if number >= 0 else 0)
