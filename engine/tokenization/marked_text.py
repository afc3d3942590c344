"""Read the markers of a rendered conversation back."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from engine.tokenization.markers import MarkedConversation


@dataclass(frozen=True)
class Anchor:
    """A marker of the rendered text: its position without the markers, and its number or -1."""

    position: int
    number: int


@dataclass
class MarkedText:
    """A rendered conversation without its markers, and where they stood.

    Attributes:
        plain: the text without markers.
        anchors: markers in order. A text that a template writes again (the name of a function
            above the function's result, say) is anchored where it stands first.
        turns: for every assistant message that is shown, its first and last anchor (indices).
        shown: numbers of the markers that occur.
        unclear: messages whose text is shown twice, or with another's text in between.
    """

    plain: str
    anchors: list[Anchor] = field(default_factory=list)
    turns: dict[int, tuple[int, int]] = field(default_factory=dict)
    shown: set[int] = field(default_factory=set)
    unclear: set[int] = field(default_factory=set)

    def before(self, turn: int) -> int:
        """Where the last text before a turn ends; 0 for the first."""
        first = self.turns[turn][0]
        return self.anchors[first - 1].position if first else 0

    def start(self, turn: int) -> int:
        """Where the first marked text of a turn begins."""
        return self.anchors[self.turns[turn][0]].position

    def end(self, turn: int) -> int:
        """Where the last marked text of a turn ends, or was marked in its middle."""
        return self.anchors[self.turns[turn][1]].position

    def after(self, turn: int) -> int:
        """Where the first text after a turn begins, or the end of the conversation."""
        last = self.turns[turn][1]
        return self.anchors[last + 1].position if last + 1 < len(self.anchors) else len(self.plain)

    def number_before(self, turn: int) -> int | None:
        """Number of the marker before a turn; None for none."""
        first = self.turns[turn][0]
        return self.anchors[first - 1].number if first else None

    def number_at_end(self, turn: int) -> int:
        """Number of the last marker of a turn."""
        return self.anchors[self.turns[turn][1]].number

    @property
    def last_number(self) -> int | None:
        """Number of the last marker; None for none."""
        return self.anchors[-1].number if self.anchors else None

    @property
    def tail(self) -> str:
        """What follows the last marker."""
        return self.plain[self.anchors[-1].position :] if self.anchors else self.plain


def read_marked(text: str, conversation: MarkedConversation) -> MarkedText:
    """Take the markers out of a rendered text.

    Args:
        text: rendered from the messages of `conversation`.
        conversation: what each marker marks.
    """
    pieces: list[str] = []
    result = MarkedText("")
    seen: Counter[int] = Counter()
    length = end = 0
    for match in conversation.pattern.finditer(text):
        pieces.append(text[end : match.start()])
        length, end = length + match.start() - end, match.end()
        number = int(match.group(1)) if match.group(1) else -1
        seen[number] += 1
        part = conversation.parts[number] if number >= 0 else None
        if part is not None and seen[number] > part.markers:
            if part.kind == "content":
                result.unclear.add(part.message)
            continue
        result.anchors.append(Anchor(length, number))
    pieces.append(text[end:])
    result.plain = "".join(pieces)
    result.shown = set(seen) - {-1}
    _find_turns(result, conversation)
    return result


def _find_turns(text: MarkedText, conversation: MarkedConversation) -> None:
    previous: int | None = None
    for index, anchor in enumerate(text.anchors):
        message = conversation.parts[anchor.number].message if anchor.number >= 0 else None
        if message is not None:
            if message in text.turns and message != previous:
                text.unclear.add(message)
            text.turns[message] = (text.turns.get(message, (index, index))[0], index)
        previous = message


def common_prefix(text: str, other: str) -> int:
    """Length of the longest common beginning of two texts."""
    length = min(len(text), len(other))
    if text[:length] == other[:length]:
        return length
    low, high = 0, length
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if text[:middle] == other[:middle] else (low, middle)
    return low


def missing(text: MarkedText, conversation: MarkedConversation) -> Mapping[int, set[str]]:
    """Kinds of text of each message that a rendering leaves out."""
    result: dict[int, set[str]] = {}
    for number, part in enumerate(conversation.parts):
        if number not in text.shown:
            result.setdefault(part.message, set()).add(part.kind)
    return result
