"""A campaign, and the loop of those that read damaged bytes."""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from engine.errors import EngineError

Figures = dict[str, Any]
PART = 1_000_000
"""A seed is a number of this size for each row before, and the first trial of the part."""

_LARGEST = ("worst", "slowest", "most")


@dataclass(frozen=True)
class Campaign:
    """`run(trials, seed)` gives figures; `passed` says whether they are as promised.

    With `part` it is run for so many trials at a time, and goes on after a stop where it was.
    """

    what: str
    trials: int
    run: Callable[[int, int], Figures]
    passed: Callable[[Figures], bool]
    part: int = 0

    def parts(self, trials: int) -> Iterator[tuple[int, int]]:
        """First trial and number of trials of each part."""
        size = self.part or trials
        yield from ((first, min(size, trials - first)) for first in range(0, trials, size))


def merged(one: Figures, other: Figures) -> Figures:
    """The figures of two parts together: sums, the largest of what is a worst, lists in a row."""
    result = dict(one)
    for key, value in other.items():
        before = result.get(key)
        if before is None:
            result[key] = value
        elif isinstance(value, dict):
            result[key] = merged(before, value)
        elif isinstance(value, bool):
            result[key] = before and value
        elif key.startswith(_LARGEST):
            result[key] = max(before, value)
        elif isinstance(value, int | float | list):
            result[key] = before + value
    return result


def fuzz(
    make: Callable[[random.Random], bytes], read: Callable[[bytes], object], trials: int, seed: int
) -> Figures:
    """Read damaged bytes: accepted, or refused by an `EngineError` that can be printed."""
    chance, counts, worst = random.Random(seed), Counter[str](), 0.0
    for _ in range(trials):
        data = make(chance)
        started = time.process_time()
        try:
            read(data)
            counts["accepted"] += 1
        except EngineError as error:
            message = str(error)
            fine = len(message) < 2000 and message.isprintable()
            counts["named" if fine else "unprintable"] += 1
        except Exception as error:
            counts[f"raw {type(error).__name__}"] += 1
        worst = max(worst, time.process_time() - started)
    return {"trials": trials, "worst_ms": round(1000 * worst, 1), **counts}


def no_raw(figures: Figures) -> bool:
    """Whether nothing but named errors came out."""
    bad = ("raw", "unprintable", "lost")
    return not any(value for key, value in figures.items() if key.startswith(bad))
