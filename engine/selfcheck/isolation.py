"""Run measurements in processes, so that one failure stops no other.

Items of a section run one after another in a process of their own, which reports each result as a
line. A process that dies, says nothing for too long, or reports an error of the device is replaced
by a fresh one for the items that are left; the item it was at is recorded as failed. `run_each`
gives every item a process, several at a time.

Run as ``python -m engine.selfcheck.isolation MODULE SECTION OPTIONS_JSON ITEM...``: MODULE has
`SECTIONS`, a mapping of names to objects with ``run(item, options) -> dict``.
"""

from __future__ import annotations

import importlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_MARK = "\x1e"
_START_SECONDS = 60.0
_LAST_LINES = 12
_BROKEN_CONTEXT = ("CUDA error", "device-side assert", "AcceleratorError", "CUBLAS_STATUS")


@dataclass(frozen=True)
class Outcome:
    """What one item gave: `data`, or the `error` that kept it from giving any."""

    item: str
    seconds: float
    data: Mapping[str, Any] | None = None
    error: str | None = None


@dataclass(frozen=True)
class ProcessLimits:
    """How many processes run at a time, and until when (of time.monotonic)."""

    deadline: float
    item_seconds: float
    processes: int = 1


def run_here(
    module: str, section: str, items: Sequence[str], options: Mapping[str, Any], deadline: float
) -> list[Outcome]:
    """The items in this process, until `deadline` (of time.monotonic) has passed."""
    run = importlib.import_module(module).SECTIONS[section].run
    return [
        _one(run, item, options)
        if time.monotonic() < deadline
        else Outcome(item, 0.0, error="not run: the time was used up")
        for item in items
    ]


def run_each(
    module: str,
    section: str,
    items: Sequence[str],
    options: Mapping[str, Any],
    limits: ProcessLimits,
) -> Iterator[Outcome]:
    """Every item in a process of its own, as they end. `options` may hold `environment`."""

    def one(item: str) -> Outcome:
        end = min(limits.deadline, time.monotonic() + limits.item_seconds + _START_SECONDS)
        (outcome,) = run_apart(module, section, [item], options, end, limits.item_seconds)
        return outcome

    with ThreadPoolExecutor(limits.processes) as pool:
        for done in as_completed([pool.submit(one, item) for item in items]):
            yield done.result()


def run_apart(
    module: str,
    section: str,
    items: Sequence[str],
    options: Mapping[str, Any],
    deadline: float,
    item_seconds: float,
) -> list[Outcome]:
    """The items in processes of their own; none takes longer than `item_seconds`."""
    left, outcomes = list(items), list[Outcome]()
    while left and time.monotonic() < deadline:
        worker = _Worker(module, section, options, left)
        try:
            outcomes += worker.outcomes(left, deadline, item_seconds)
        finally:
            worker.end()
        done = {outcome.item for outcome in outcomes}
        left = [item for item in items if item not in done]
    return outcomes + [Outcome(item, 0.0, error="not run: the time was used up") for item in left]


class _Worker:
    """A process that runs items and the lines it has said so far."""

    def __init__(
        self, module: str, section: str, options: Mapping[str, Any], items: Sequence[str]
    ) -> None:
        command = [sys.executable, "-m", "engine.selfcheck.isolation", module, section]
        self._process = subprocess.Popen(
            [*command, json.dumps(options), *items],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            env={**os.environ, **options.get("environment", {})},
        )
        self._last_words: deque[str] = deque(maxlen=_LAST_LINES)
        self._errors = threading.Thread(target=self._read_errors, daemon=True)
        self._errors.start()
        self._lines: queue.Queue[str | None] = queue.Queue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as lines:
            for line in lines:
                if line.startswith(_MARK):
                    self._lines.put(line[1:])
                else:
                    self._last_words.append(line)
        self._lines.put(None)

    def _read_errors(self) -> None:
        assert self._process.stderr is not None
        with self._process.stderr as lines:
            self._last_words.extend(lines)

    def _death(self, status: int) -> str:
        """How the process ended, with the last that it said."""
        how = f"with status {status}" if status >= 0 else f"by {_signal_name(-status)}"
        self._errors.join(timeout=5.0)
        said = " ".join(" ".join(self._last_words).split())[-300:]
        return f"the process ended {how}" + (f": {said}" if said else "")

    def outcomes(self, items: Sequence[str], deadline: float, item_seconds: float) -> list[Outcome]:
        """Results until the last item, the process's end, or a silence; one for that too."""
        outcomes: list[Outcome] = []
        allowance = _START_SECONDS
        for item in items:
            started = time.monotonic()
            wait = min(item_seconds + allowance, max(0.1, deadline - started))
            allowance = 0.0
            try:
                line = self._lines.get(timeout=wait)
            except queue.Empty:
                outcomes.append(Outcome(item, wait, error=f"no result within {wait:.0f} s"))
                return outcomes
            if line is None:
                status = self._process.wait()
                if not outcomes or not _breaks_context(outcomes[-1].error):
                    seconds = time.monotonic() - started
                    outcomes.append(Outcome(item, seconds, error=self._death(status)))
                return outcomes
            outcomes.append(Outcome(**json.loads(line)))
        return outcomes

    def end(self) -> None:
        self._process.kill()
        self._process.wait()
        self._reader.join(timeout=5.0)
        self._errors.join(timeout=5.0)


def _one(run: Any, item: str, options: Mapping[str, Any]) -> Outcome:
    started = time.monotonic()
    try:
        data = run(item, options)
    except Exception as error:
        # Whatever went wrong is this item's result; the others are measured all the same.
        where = traceback.extract_tb(error.__traceback__)[-1]
        text = " ".join(str(error).split())[:500]
        message = f"{type(error).__name__}: {text} ({Path(where.filename).name}:{where.lineno})"
        return Outcome(item, time.monotonic() - started, error=message)
    return Outcome(item, time.monotonic() - started, data=data)


def _signal_name(number: int) -> str:
    """SIGSEGV for 11: what the system ended a process by."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _breaks_context(error: str | None) -> bool:
    """Whether the process's GPU context can no longer be trusted after this error."""
    return error is not None and any(sign in error for sign in _BROKEN_CONTEXT)


def main(arguments: Sequence[str]) -> None:
    module, section, options, *items = arguments
    run = importlib.import_module(module).SECTIONS[section].run
    for item in items:
        outcome = _one(run, item, json.loads(options))
        print(_MARK + json.dumps(outcome.__dict__), flush=True)
        if _breaks_context(outcome.error):
            return


if __name__ == "__main__":
    main(sys.argv[1:])
