"""Rows that are equal after normalisation, or nearly: MinHash with LSH.

A text is the set of its runs of five words. The share of runs that two texts have in common
(Jaccard) is estimated by 128 minima of hashes (Broder, 1997); rows that agree in one band of them
are candidates (Indyk and Motwani, 1998), and every candidate is measured on the sets themselves.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from engine.data.corpus.reading import CorpusRow

Hashes = npt.NDArray[np.uint64]
RUN = 5
"""Words that a run has."""

_MINIMA = 128
_MOST_PAIRS = 200
"""Members of a bucket that are all compared with each other; of more, with the first of each."""

_FACTOR = np.uint64(0x9E3779B97F4A7C15)
# Scripts without spaces between words: a character counts as one.
_WORD = re.compile(r"[぀-ヿ㐀-鿿가-힯]|[^\W぀-ヿ㐀-鿿가-힯]+")


def normalised(text: str) -> str:
    """A text without what makes no difference: case, spaces, forms of one character."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def view(item: CorpusRow, name: str) -> str:
    """The `all`, `prompt` or `response` of a row, as one text."""
    asked, answered = item.texts
    if name == "all":
        return f"{asked}\n\n{answered}" if asked else answered
    return asked if name == "prompt" else answered


def repeated(rows: Sequence[CorpusRow], name: str = "all") -> int:
    """How many rows repeat an earlier one exactly, after normalisation."""
    texts = Counter(normalised(view(item, name)) for item in rows)
    texts.pop("", None)
    return sum(count - 1 for count in texts.values())


def words_of(text: str) -> list[str]:
    """The words of a text; of one without any, its characters."""
    text = normalised(text)
    return _WORD.findall(text) or list(text.replace(" ", ""))


def runs(words: Sequence[str], length: int = RUN) -> Hashes:
    """A hash of each run of `length` words, in order; of fewer words, one of all of them."""
    if not words:
        return np.empty(0, np.uint64)
    single = np.array([_word_hash(word) for word in words], dtype=np.uint64)
    length = min(length, len(words))
    total = np.zeros(len(words) - length + 1, np.uint64)
    for offset in range(length):
        total = total * _FACTOR + single[offset : offset + len(total)]
    # The last step of SplitMix64, so that the high bits depend on every word.
    total = (total ^ (total >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    return total ^ (total >> np.uint64(31))


@lru_cache(maxsize=1 << 18)
def _word_hash(word: str) -> int:
    data = word.encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


class RowSets:
    """Sets of row numbers that are joined pair by pair (union-find)."""

    def __init__(self, count: int) -> None:
        self._parents = list(range(count))

    def root(self, row: int) -> int:
        """The first row of the set that a row is in."""
        while self._parents[row] != row:
            self._parents[row] = self._parents[self._parents[row]]
            row = self._parents[row]
        return row

    def join(self, one: int, other: int) -> None:
        """Make one set of two."""
        first, second = sorted((self.root(one), self.root(other)))
        self._parents[second] = first

    def sets(self) -> list[list[int]]:
        """The sets, each in order, by their first rows."""
        members = defaultdict[int, list[int]](list)
        for row in range(len(self._parents)):
            members[self.root(row)].append(row)
        return list(members.values())


def join_equal(groups: RowSets, texts: Sequence[str]) -> None:
    """Join rows whose texts are equal after normalisation; empty ones have nothing in common."""
    first: dict[str, int] = {}
    for row, text in enumerate(texts):
        key = normalised(text)
        if key:
            groups.join(first.setdefault(key, row), row)


def join_similar(groups: RowSets, texts: Sequence[str], threshold: float) -> None:
    """Join rows whose texts share at least `threshold` of their runs of words.

    Texts of fewer than five words are joined where they have the same words.
    """
    sets = [np.unique(runs(words_of(text))) for text in texts]
    rows = [row for row, own in enumerate(sets) if own.size]
    if not rows:
        return
    bands, width = banding(threshold)
    signatures = np.stack([_minima(sets[row]) for row in rows])
    for band in range(bands):
        buckets = defaultdict[bytes, list[int]](list)
        part = np.ascontiguousarray(signatures[:, band * width : (band + 1) * width])
        for row, key in zip(rows, part, strict=True):
            buckets[key.tobytes()].append(row)
        for members in buckets.values():
            _join_bucket(groups, sets, members, threshold)


def _join_bucket(
    groups: RowSets, sets: Sequence[Hashes], members: list[int], threshold: float
) -> None:
    firsts: list[int] = []
    for index, row in enumerate(members):
        others = members[:index] if len(members) <= _MOST_PAIRS else firsts
        alone = True
        for other in others:
            same = groups.root(other) == groups.root(row)
            if same or jaccard(sets[row], sets[other]) >= threshold:
                alone = False
                groups.join(row, other)
                if len(members) > _MOST_PAIRS:
                    break
        if alone:
            firsts.append(row)


def jaccard(one: Hashes, other: Hashes) -> float:
    """Size of the intersection over size of the union, of sorted sets."""
    smaller, larger = sorted((one.size, other.size))
    shared = np.intersect1d(one, other, assume_unique=True).size
    return float(shared / max(smaller + larger - shared, 1))


def banding(threshold: float) -> tuple[int, int]:
    """Number and width of bands: the widest with which a pair at `threshold` is met by 95 %."""
    for width in range(16, 1, -1):
        bands = _MINIMA // width
        if 1 - (1 - threshold**width) ** bands >= 0.95:
            return bands, width
    return _MINIMA, 1


def _minima(own: Hashes) -> npt.NDArray[np.uint32]:
    """128 minima of multiply-shift hashes of a set, (128,)."""
    factors, terms = _coefficients()
    lowest = np.full(_MINIMA, np.iinfo(np.uint64).max, np.uint64)
    for start in range(0, own.size, 4096):  # bounded memory for a book
        part = own[start : start + 4096, None] * factors + terms
        lowest = np.minimum(lowest, part.min(axis=0))
    return (lowest >> np.uint64(32)).astype(np.uint32)


@lru_cache(maxsize=1)
def _coefficients() -> tuple[Hashes, Hashes]:
    generator = np.random.default_rng(2024)
    factors = generator.integers(0, 2**63, _MINIMA, dtype=np.uint64) * np.uint64(2) + np.uint64(1)
    return factors, generator.integers(0, 2**63, _MINIMA, dtype=np.uint64)
