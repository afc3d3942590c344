"""Leave out rows that share words with rows held out for evaluation.

A row is contaminated where one of its messages has `length` consecutive words of a held-out message
(thirteen, as for GPT-3). A shorter held-out question counts whole, wherever it stands, one of fewer
than five words only where it is all that is asked. Short held-out answers say nothing by
themselves.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from engine.data.corpus.reading import CorpusRow
from engine.data.corpus.similar import Hashes, runs, words_of

_FEWEST = 5


@dataclass(frozen=True)
class Contamination:
    """A row that is left out: its number, the held-out row, and the words they share."""

    row: int
    heldout: str
    words: str


@dataclass
class HeldoutRuns:
    """Runs of words of held-out rows.

    Attributes:
        length: words of a run.
        runs: number of words -> hash -> `file:line` of the first row that has it.
        questions: whole questions of few words.
        ignored: held-out rows that are too short to be recognised.
    """

    length: int
    runs: dict[int, dict[int, str]] = field(default_factory=lambda: defaultdict(dict))
    questions: dict[tuple[str, ...], str] = field(default_factory=dict)
    ignored: int = 0

    def __post_init__(self) -> None:
        self._tables: dict[int, Hashes] = {}

    def add(self, item: CorpusRow) -> None:
        """Take the runs of a held-out row."""
        known = False
        for text, is_question in _parts(item):
            words = words_of(text)
            length = min(self.length, len(words))
            if length == self.length or (is_question and length >= _FEWEST):
                for run in runs(words, length).tolist():
                    self.runs[length].setdefault(run, item.row.source)
                known = True
            elif is_question and words:
                self.questions.setdefault(tuple(words), item.row.source)
                known = True
        self.ignored += not known
        self._tables.clear()

    def match(self, item: CorpusRow) -> tuple[str, str] | None:
        """The held-out row that a row shares words with, and the words; None for none."""
        for text, is_question in _parts(item):
            words = words_of(text)
            if is_question and tuple(words) in self.questions:
                return self.questions[tuple(words)], " ".join(words)
            for length in self.runs:
                if len(words) < length:
                    continue
                own = runs(words, length)
                table = self._table(length)
                nearest = np.minimum(np.searchsorted(table, own), table.size - 1)
                at = np.flatnonzero(table[nearest] == own)
                if at.size:
                    start = int(at[0])
                    shared = " ".join(words[start : start + length])
                    return self.runs[length][int(own[start])], shared
        return None

    def _table(self, length: int) -> Hashes:
        if length not in self._tables:
            self._tables[length] = np.array(sorted(self.runs[length]), dtype=np.uint64)
        return self._tables[length]


def contaminated_rows(rows: Sequence[CorpusRow], heldout: HeldoutRuns) -> list[Contamination]:
    """The rows that share words with held-out ones, each with the first match."""
    matches = ((number, heldout.match(item)) for number, item in enumerate(rows))
    return [Contamination(number, *match) for number, match in matches if match is not None]


def _parts(item: CorpusRow) -> list[tuple[str, bool]]:
    """What a row says, a text for each message, and whether it is a question; system prompts
    are left out, as rows of all sides have the same."""
    row = item.row
    if not row.messages:
        return [(text, False) for text in item.texts if text]
    messages = [*row.messages, *(row.rejected or [])[-1:]]
    return [
        (str(message.get("content") or ""), message["role"] == "user")
        for message in messages
        if message["role"] not in ("system", "developer")
    ]
