"""A campaign, and the loop of those that read damaged bytes."""

from __future__ import annotations

import logging
import os
import random
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.errors import EngineError
from engine.memory.process import forget_peak, peak_resident

Figures = dict[str, Any]
PART = 1_000_000
"""A seed is a number of this size for each row before, and the first trial of the part."""

_LARGEST = ("worst", "slowest", "most")
_MEMORY = Path("/dev/shm")
MOST_MS = 50.0
"""Processor time of one input, which a busy machine does not lengthen as it does a clock's."""

MOST_MIB = 64.0
_WARM = 100


@dataclass(frozen=True)
class Campaign:
    """`run(trials, seed)` gives figures; `passed` says whether they are as promised.

    With `part` it is run for so many trials at a time, and goes on after a stop where it was. Its
    folders are on a file system in memory where there is one, unless it is about the `disk`.
    """

    what: str
    trials: int
    run: Callable[[int, int], Figures]
    passed: Callable[[Figures], bool]
    part: int = 0
    disk: bool = False

    def parts(self, trials: int) -> Iterator[tuple[int, int]]:
        """First trial and number of trials of each part."""
        size = self.part or trials
        yield from ((first, min(size, trials - first)) for first in range(0, trials, size))


@contextmanager
def scratch_folders(disk: bool) -> Iterator[None]:
    """Temporary folders of this process and its children in memory: a trial opens many files."""
    before, told = tempfile.tempdir, os.environ.get("TMPDIR")
    if not disk and _MEMORY.is_dir() and os.access(_MEMORY, os.W_OK):
        tempfile.tempdir = os.environ["TMPDIR"] = str(_MEMORY)
    try:
        yield
    finally:
        tempfile.tempdir = before
        os.environ.pop("TMPDIR", None)
        if told is not None:
            os.environ["TMPDIR"] = told


@contextmanager
def silent() -> Iterator[None]:
    """Without the lines that a reader logs about what it ignores."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(before)


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
    """Read damaged bytes: accepted, or refused by an `EngineError` that can be printed.

    `worst_ms` is the processor time of the slowest input. One over the limit is read again and the
    shorter time counts: what is slow once only was an import.
    """
    chance, counts, worst = random.Random(seed), Counter[str](), 0.0
    with silent():
        for _ in range(min(trials, _WARM)):
            outcome(read, make(chance))
        forget_peak()
        before = peak_resident()
        for _ in range(trials):
            data = make(chance)
            kind, seconds = outcome(read, data)
            if 1000 * seconds > MOST_MS:
                seconds = min(seconds, outcome(read, data)[1])
            counts[kind] += 1
            worst = max(worst, seconds)
    worst_ms, mib = round(1000 * worst, 1), round((peak_resident() - before) / 2**20, 1)
    return {"trials": trials, "worst_ms": worst_ms, "most_mib_more": mib, **counts}


def outcome(read: Callable[[Any], object], data: Any) -> tuple[str, float]:
    """What came of reading an input, and the processor time of it."""
    started = time.process_time()
    try:
        read(data)
        kind = "accepted"
    except EngineError as error:
        message = str(error)
        kind = "named" if len(message) < 2000 and message.isprintable() else "unprintable"
    except Exception as error:
        kind = f"raw {type(error).__name__}"
    return kind, time.process_time() - started


def no_raw(figures: Figures) -> bool:
    """Whether nothing but named errors came out, in time and in little memory."""
    bad = ("raw", "unprintable", "lost")
    raw = any(value for key, value in figures.items() if key.startswith(bad))
    slow, large = figures.get("worst_ms", 0.0), figures.get("most_mib_more", 0.0)
    return not raw and slow <= MOST_MS and large <= MOST_MIB
