"""Turn tokens into text while they come."""

from __future__ import annotations

from collections.abc import Callable, Sequence


class TextStream:
    """Text of a growing list of ids, handed out as soon as later ids cannot change it.

    A character of several bytes may come in several tokens, and a stop string too: both stay back
    until they are whole. Only the last few ids are decoded again, so the cost does not grow with
    the answer. `decode` turns ids into text; `stop` are the strings that end it.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], stop: Sequence[str] = ()) -> None:
        self._decode = decode
        self._stop = [text for text in stop if text]
        self._ids: list[int] = []
        # Text up to `_read` is known; decoding from `_start` on gives a tokenizer its context.
        self._start = self._read = 0
        self.text = ""
        self._shown = 0

    def push(self, token: int) -> str:
        """Add an id; returns the text that is certain now and has not been returned before."""
        self._ids.append(token)
        before = self._decode(self._ids[self._start : self._read])
        now = self._decode(self._ids[self._start :])
        if len(now) <= len(before) or now.endswith("\ufffd"):
            return ""
        self.text += now[len(before) :]
        self._start, self._read = self._read, len(self._ids)
        return self._show(len(self.text) - self._unsure())

    def stopped(self) -> bool:
        """Whether a stop string has come; the text then ends before it."""
        # What was handed out holds none, nor the beginning of one.
        starts = (self.text.find(mark, self._shown) for mark in self._stop)
        cuts = [start for start in starts if start >= 0]
        if cuts:
            self.text = self.text[: min(cuts)]
        return bool(cuts)

    def finish(self, text: str) -> str:
        """The rest of the whole answer `text` that has not been returned yet."""
        rest = text[self._shown :] if text.startswith(self.text[: self._shown]) else ""
        self._shown += len(rest)
        return rest

    def _unsure(self) -> int:
        """How many characters at the end may be the beginning of a stop string, or are one."""
        longest = 0
        for mark in self._stop:
            begin = self.text.find(mark, self._shown)
            if begin >= 0:
                longest = max(longest, len(self.text) - begin)
            size = min(len(mark) - 1, len(self.text))
            partial = (n for n in range(size, 0, -1) if self.text.endswith(mark[:n]))
            longest = max(longest, next(partial, 0))
        return longest

    def _show(self, end: int) -> str:
        new = self.text[self._shown : end]
        self._shown = max(self._shown, end)
        return new
