"""Where an answer begins and ends in a rendered conversation.

An answer begins where the generation prompt ends: the beginning of the conversation is rendered
with and without it, and what that adds is looked for before the answer. A template that has none
is given a short answer instead, and what it writes before that is its header. An answer ends with
the last end-of-turn token that the text has in common with the rendering that ends there. Both
comparisons are made once for each kind of turn: by what stands before it, and by what follows it.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from engine.tokenization.marked_text import MarkedText, common_prefix, read_marked
from engine.tokenization.markers import REASONING_TAG, MarkedConversation, closes_reasoning
from engine.tokenization.messages import has_text
from engine.tokenization.sandbox import Job, Rendered

Span = tuple[int, int]
Run = Callable[[list[Job]], list[Rendered]]

MOST_COMPARED = 64
"""Turns of one conversation that may need a comparison of their own."""

_SPACE = re.compile(r"\s*")
_CUT_TAG = re.compile(r"[<\[][^<>\[\]\s]{0,60}$")


class EndTokens:
    """Tokens that may end a turn.

    Args:
        texts: the tokens' texts.
    """

    def __init__(self, texts: Iterable[str]) -> None:
        # Longest first: where one token is the beginning of another, the longer one is meant.
        self.texts = tuple(sorted({t for t in texts if t}, key=lambda t: (-len(t), t)))
        self.pattern = re.compile("|".join(map(re.escape, self.texts)) or r"(?!)")

    def opening(self, head: str) -> set[str]:
        """The first tokens of a conversation's beginning, up to its first word: they open turns."""
        tokens: set[str] = set()
        match = self.pattern.search(head)
        if match is not None and re.search(r"\s", head[: match.start()]):
            return tokens  # More than a BOS token stands before it.
        while match is not None:
            tokens.add(match.group())
            match = self.pattern.match(head, match.end())
        return tokens

    def last_shared(self, trailer: str, other: str | None = None) -> re.Match[str] | None:
        """The last end token of `trailer` up to which it has the same tokens as `other`."""
        tokens = [m.group() for m in self.pattern.finditer(other)] if other is not None else None
        last = None
        for index, match in enumerate(self.pattern.finditer(trailer)):
            if tokens is not None and tokens[index : index + 1] != [match.group()]:
                break
            last = match
        return last


@dataclass
class _Opening:
    """How turns of one kind begin.

    Attributes:
        text: what stands between the last text before the turn and the turn.
        prompt: index in it from which on it belongs to the turn itself.
    """

    text: str
    prompt: int


class EdgeFinder:
    """Finds the edges of the turns of one conversation.

    Args:
        messages: the conversation.
        turns: indices of the messages whose edges are wanted.
        marked: the conversation with markers.
        ends: tokens that may end a turn.
        has_prompt: whether the template knows a generation prompt.
    """

    def __init__(
        self,
        messages: Sequence[Mapping[str, Any]],
        turns: Sequence[int],
        marked: MarkedConversation,
        ends: EndTokens,
        has_prompt: bool,
    ) -> None:
        self._messages, self._turns, self._marked = messages, turns, marked
        self._tokens, self._has_prompt = ends, has_prompt
        self._first_before: dict[Any, int] = {}
        self._first_after: dict[Any, int] = {}
        self._appended = ""
        for turn in turns:
            self._first_before.setdefault(self._kind_before(turn), turn)
            if turn + 1 < len(messages):
                self._first_after.setdefault(self._kind_after(turn), turn)
        self._end_tokens: dict[Any, tuple[str, int]] = {}
        self.starts: dict[int, int] = {}
        self.ends: dict[int, int] = {}

    def jobs(self) -> list[Job]:
        """Renderings to compare with, one or two for each kind of turn."""
        jobs = [job for turn in self._first_before.values() for job in self._openings(turn)]
        return jobs + [Job(turn + 1, marked=True) for turn in self._first_after.values()]

    def compare(self, text: MarkedText, parts: Sequence[Rendered], run: Run) -> None:
        """Find the edges; those that cannot be found are missing in `starts` and `ends`.

        Args:
            text: the conversation.
            parts: what `jobs` gave.
            run: does further jobs, for turns that differ from the first of their kind.
        """
        count = 2 * len(self._first_before)
        head = text.plain[: text.anchors[0].position] if text.anchors else ""
        opening_tokens = self._tokens.opening(head)
        openings: dict[Any, _Opening | None] = {}
        for number, (kind, turn) in enumerate(self._first_before.items()):
            own = parts[2 * number : 2 * number + 2]
            openings[kind] = self._opening(text, turn, own, run)
            self._appended = self._appended or _last_turn_opened(self._read(own[0]), opening_tokens)
        for (kind, turn), part in zip(self._first_after.items(), parts[count:], strict=True):
            self._compare_end(text, turn, part, kind)
        for turn in self._turns:
            opening = openings[self._kind_before(turn)]
            if turn in text.turns and opening is not None:
                self._start(text, turn, opening)
        for turn in self._turns:
            if turn in text.turns and turn not in self.ends:
                self._find_end(text, turn)
        open_turns = [t for t in self._turns if t not in self.starts or t not in self.ends]
        for turn in open_turns[:MOST_COMPARED]:
            self._compare_own(text, turn, run)

    def _openings(self, turn: int) -> list[Job]:
        without = Job(turn, marked=True)
        if self._has_prompt:
            return [without, Job(turn, generation_prompt=True, marked=True)]
        return [without, self._probe(turn)]

    def _probe(self, turn: int) -> Job:
        """What the template writes before a short answer in the turn's stead."""
        probe: Any = self._marked.probe
        if isinstance(self._messages[turn].get("content"), list):
            probe = [{"type": "text", "text": probe}]
        return Job(turn, marked=True, answer=probe)

    def _opening(
        self, text: MarkedText, turn: int, parts: Sequence[Rendered], run: Run
    ) -> _Opening | None:
        """What stands before turns of the kind of this one."""
        without, prompted = (self._read(part) for part in parts)
        if prompted is None or not _same_kind(text, turn, prompted):
            return None
        # White space at the end of the text before is the text's own.
        base = without.tail.lstrip() if without is not None else ""
        tail = prompted.tail.lstrip()
        if self._has_prompt and tail == base:
            # The template has no generation prompt here: its header shows before a short answer.
            (part,) = run([self._probe(turn)])
            probed = self._read(part)
            tail = probed.tail.lstrip() if probed is not None else tail
        head, probe, _ = tail.partition(self._marked.probe)
        if not (probe or self._has_prompt):
            return None
        shared = common_prefix(head, base)
        shared = shared if shared == len(base) else _whole_tags(head, shared)
        return _Opening(head, shared)

    def _start(self, text: MarkedText, turn: int, opening: _Opening) -> None:
        before, first = past_space(text.plain, text.before(turn)), text.start(turn)
        prompt = opening.text[opening.prompt :]
        start = _matched(text.plain, before, opening.text, opening.prompt)
        if start is None:
            at = _header_index(text.plain, before, first, prompt)
            start = None if at is None else _matched(text.plain, at, prompt, 0)
        if start is None and first == before + opening.prompt:
            start = first  # It follows the text before without any header.
        if start is not None:
            self.starts[turn] = start

    def _compare_end(self, text: MarkedText, turn: int, part: Rendered, kind: Any) -> None:
        """Where a turn ends that a rendering ends with, too."""
        shorter = self._read(part)
        if shorter is None or turn not in text.turns or turn not in shorter.turns:
            return
        if shorter.number_at_end(turn) != text.number_at_end(turn):
            return
        end, gap = self._gap(text, turn)
        tail = shorter.plain[self._gap(shorter, turn)[0] :].removesuffix(self._appended)
        match = self._tokens.last_shared(gap, tail) or self._tokens.pattern.match(
            gap, len(gap) - len(gap.lstrip())
        )
        if match is not None:
            token = match.group()
            self.ends[turn] = end + match.end()
            self._end_tokens[kind] = (token, gap.count(token, 0, match.end()))

    def _find_end(self, text: MarkedText, turn: int) -> None:
        """Where a turn ends, of which a like one was compared or which is the last."""
        end, gap = self._gap(text, turn)
        if turn + 1 == len(self._messages):
            match = self._tokens.last_shared(gap.removesuffix(self._appended))
            match = match or self._tokens.last_shared(gap)
            if match is not None:
                self.ends[turn] = end + match.end()
            return
        token, times = self._end_tokens.get(self._kind_after(turn), ("", 0))
        at = 0
        for _ in range(times):
            index = gap.find(token, at)
            if index < 0:
                return
            at = index + len(token)
        if times:
            self.ends[turn] = end + at

    def _gap(self, text: MarkedText, turn: int) -> tuple[int, str]:
        """Where the last text of a turn ends, and what follows up to the next text."""
        end = text.end(turn)
        behind = self._marked.parts[text.number_at_end(turn)].behind
        if behind and text.plain.startswith(behind, end):
            end += len(behind)
        return end, text.plain[end : max(end, text.after(turn))]

    def _compare_own(self, text: MarkedText, turn: int, run: Run) -> None:
        """Compare one turn by itself, where it differs from the others of its kind."""
        jobs = self._openings(turn)
        if turn + 1 < len(self._messages):
            jobs.append(Job(turn + 1, marked=True))
        parts = run(jobs)
        if turn not in self.starts and turn in text.turns:
            opening = self._opening(text, turn, parts[:2], run)
            if opening is not None:
                self._start(text, turn, opening)
        before, *after = [self._read(part) for part in parts[1:]]
        if turn not in self.starts and before is not None:
            head = before.plain.partition(self._marked.probe)[0]
            known = self._has_prompt or head != before.plain
            if known and text.plain.startswith(head):
                self.starts[turn] = len(head)
        if turn in self.ends or turn not in self.starts:
            return
        whole = after[0] if after else text
        if whole is not None and text.plain.startswith(whole.plain.rstrip()):
            trailer = whole.plain.rstrip()
            if trailer.endswith(self._tokens.texts) and len(trailer) > self.starts[turn]:
                self.ends[turn] = len(trailer)

    def _read(self, part: Rendered) -> MarkedText | None:
        return None if part.error is not None else read_marked(part.text, self._marked)

    def _kind_before(self, turn: int) -> Any:
        if turn == 0:
            return None
        before = self._messages[turn - 1]
        return before["role"], bool(before.get("tool_calls")), has_text(before.get("content"))

    def _kind_after(self, turn: int) -> Any:
        calls = self._messages[turn].get("tool_calls")
        if calls and any(self._tokens.pattern.search(key) for key in _keys(calls)):
            return turn  # Keys have no markers: this turn is compared by itself.
        return self._messages[turn + 1]["role"], bool(calls)


def _keys(value: Any) -> Iterator[str]:
    """All keys of a JSON value, at any depth."""
    if isinstance(value, list):
        for item in value:
            yield from _keys(item)
    elif isinstance(value, dict):
        for key, item in value.items():
            yield key
            yield from _keys(item)


def _same_kind(text: MarkedText, turn: int, prompted: MarkedText) -> bool:
    """Whether the last marker of a beginning is of the kind that stands before a turn."""
    if turn not in text.turns:
        return False
    number = text.number_before(turn)
    return number == prompted.last_number


def _last_turn_opened(text: MarkedText | None, opening: set[str]) -> str:
    """What a template that always begins the next turn writes after the last message."""
    if text is None:
        return ""
    at = max((text.tail.rfind(token) for token in opening), default=-1)
    return text.tail[at:] if at >= 0 else ""


def _matched(text: str, at: int, opening: str, prompt: int) -> int | None:
    """Where a turn begins whose opening stands in `text` from `at` on, or None.

    Of `opening` what follows the index `prompt` is the generation prompt. The turn may go on
    otherwise with the reasoning that the prompt begins, but not with the header before it.
    """
    shared = common_prefix(opening, text[at : at + len(opening)])
    if shared == len(opening):
        return at + shared
    shared = _whole_tags(opening, shared)
    tags = [*REASONING_TAG.finditer(opening, prompt, shared)]
    if tags and not closes_reasoning(tags[-1].group()):
        # The prompt goes on otherwise with the reasoning: the model must write all of it.
        shared = tags[-1].start()
    header = _header(opening[prompt:])
    return at + shared if shared >= prompt + len(header) else None


def _header(prompt: str) -> str:
    """The first line of a generation prompt, up to the reasoning that it begins or closes."""
    tag = REASONING_TAG.search(prompt)
    head = prompt[: tag.start()] if tag is not None else prompt
    line = head.find("\n", past_space(head, 0))
    return (head[:line] if line >= 0 else head).rstrip()


def _header_index(text: str, before: int, first: int, prompt: str) -> int | None:
    """Where the header of a turn begins, somewhere between `before` and its text."""
    header = _header(prompt)
    if not header:
        return None
    at = text.rfind(header, before, first)
    if at < 0:
        at = text.find(header, before, first + len(header))
    return at if at >= 0 else None


def past_space(text: str, start: int) -> int:
    """Where white space that begins at `start` ends."""
    match = _SPACE.match(text, start)
    return match.end() if match is not None else start


def _whole_tags(text: str, end: int) -> int:
    """`end`, or the beginning of a tag such as `<|im_start|>` that it would cut."""
    match = _CUT_TAG.search(text, max(0, end - 64), end)
    return match.start() if match is not None else end
