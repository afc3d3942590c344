"""Mix rows of several sources in the proportions that a recipe names."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from engine.data.corpus.reading import CorpusRow
from engine.data.corpus.records import Record
from engine.errors import DataError


@dataclass(frozen=True)
class MixPart:
    """Rows of one source.

    Attributes:
        name: of the source.
        rows: that it has.
        rate: share of them that is drawn, over 0 and at most 1.
        weight: how often each is used; with a total, its share of that beside the others'.
    """

    name: str
    rows: Sequence[CorpusRow]
    rate: float = 1.0
    weight: float = 1.0


def mix_rows(
    parts: Sequence[MixPart], total: int | None, seed: int
) -> tuple[list[Record], dict[str, dict[str, int]]]:
    """The mixed rows, shuffled, and of each source how many it has, were used, written, repeated.

    Args:
        parts: the sources.
        total: rows to write; None for as many as rates and weights give.
        seed: of draws and order. A source's draw does not depend on the others.

    Raises:
        DataError: nothing is left.
    """
    rows, figures = list[Record](), dict[str, dict[str, int]]()
    for part, count in zip(parts, _counts(parts, total), strict=True):
        generator = random.Random(f"{seed} {part.name}".encode("utf-8", "surrogatepass"))
        pool = generator.sample(list(part.rows), _drawn(part))
        wanted = round(part.weight * len(pool)) if count is None else count
        whole, rest = divmod(wanted, len(pool)) if pool else (0, 0)
        chosen = [*list(pool) * whole, *generator.sample(pool, rest)]
        rows += [item.record for item in chosen]
        used = len(pool) if whole else rest
        figures[part.name] = {
            "read": len(part.rows),
            "used": used,
            "written": len(chosen),
            "repeated": len(chosen) - used,
        }
    if not rows:
        raise DataError("The mix has no rows: raise its rates or weights, or name other sources.")
    random.Random(seed).shuffle(rows)
    return rows, figures


def _drawn(part: MixPart) -> int:
    return max(1, round(part.rate * len(part.rows))) if part.rows else 0


def _counts(parts: Sequence[MixPart], total: int | None) -> list[int | None]:
    """Rows of each source under a total, by largest remainders; None without one."""
    if total is None:
        return [None] * len(parts)
    whole = sum(part.weight for part in parts if part.rows)
    exact = [total * part.weight / whole if part.rows else 0.0 for part in parts]
    counts = [int(share) for share in exact]
    order = sorted(range(len(parts)), key=lambda at: (counts[at] - exact[at], at))
    for at in order[: total - sum(counts)]:
        counts[at] += 1
    return list(counts)
