"""Read metrics.jsonl while it grows, into one column per figure."""

from __future__ import annotations

import json
import math
import os
from array import array
from bisect import bisect_left
from pathlib import Path
from threading import Lock
from typing import Any

from engine.monitoring.confined import is_own_file

FIGURES = (
    "loss",
    "lr",
    "grad_norm",
    "tokens_per_second",
    "peak_memory_bytes",
    "eval_loss",
    "eval_perplexity",
)
"""The figures of a step that are drawn; what a line does not have is NaN."""

_CHECKED = 256
_AT_ONCE = 1 << 24
NAN = float("nan")


class MetricsTail:
    """The steps of one metrics.jsonl, read on by `update`; safe to use from several threads.

    `steps` (int64) and each of `columns` (float64) are as long as there are steps; `last` is the
    newest line as it was read. A line whose step is not above the last one means that the run went
    on from before it: that step and all after it are dropped, as the run itself does. `damaged`
    counts lines that are no metrics; a torn last line waits to be completed.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lock = Lock()
        self._begin_anew()

    def _begin_anew(self) -> None:
        self.steps = array("q")
        self.columns = {name: array("d") for name in FIGURES}
        self.last: dict[str, Any] = {}
        self.damaged = 0
        self._offset = 0
        self._before = b""

    def update(self) -> None:
        """Read what was appended since the last call; a file that was replaced is read anew.

        A missing file has no steps. The caller holds `lock`.
        """
        if not is_own_file(self.path):
            self._begin_anew()
            return
        with self.path.open("rb") as file:
            if not self._continues(file.fileno()):
                self._begin_anew()
            file.seek(self._offset)
            rest = b""
            while block := file.read(_AT_ONCE):
                whole, newline, rest = (rest + block).rpartition(b"\n")
                self._take(whole + newline)
        if rest and _parsed(rest) is not None:
            self._take(rest)

    def _continues(self, descriptor: int) -> bool:
        """Whether the bytes before the offset are still those that were read.

        A run that goes on writes the file anew under the same name, perhaps as long as it was.
        """
        start = self._offset - len(self._before)
        os.lseek(descriptor, start, os.SEEK_SET)
        return os.read(descriptor, len(self._before)) == self._before

    def _take(self, block: bytes) -> None:
        for row in block.split(b"\n"):
            if row.strip():
                line = _parsed(row)
                if line is None:
                    self.damaged += 1
                else:
                    self._append(line)
        self._offset += len(block)
        self._before = (self._before + block)[-_CHECKED:]

    def _append(self, line: dict[str, Any]) -> None:
        step = line["step"]
        if self.steps and step <= self.steps[-1]:
            first = bisect_left(self.steps, step)
            del self.steps[first:]
            for column in self.columns.values():
                del column[first:]
        self.steps.append(step)
        for name, column in self.columns.items():
            column.append(_number(line.get(name)))
        self.last = line


def _parsed(row: bytes) -> dict[str, Any] | None:
    """The line of metrics in `row`; None where it is not one, or not whole."""
    try:
        line = json.loads(row, parse_constant=lambda _: None)
    except (ValueError, RecursionError):
        return None
    step = line.get("step") if isinstance(line, dict) else None
    fits = type(step) is int and 0 <= step < 1 << 62
    return {key: _finite(value) for key, value in line.items()} if fits else None


def _finite(value: Any) -> Any:
    """JSON allows 1e999, which Python reads as infinity and which is no JSON again."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _number(value: Any) -> float:
    if type(value) not in (int, float) or abs(value) > 1e300:
        return NAN
    return float(value)
