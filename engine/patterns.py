"""Regular expressions of strangers, matched within a bounded time.

Python's `re` tries every way in which a pattern can match: `(a+)+$` takes twice the time with each
further character. Patterns of settings, adapters, gates and rows that may do so are matched in a
process of their own, which is ended after `SECONDS`; the others are matched here. `may_backtrack`
tells them apart by what stands in the pattern, on the safe side.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import re
import subprocess
import sys
import threading
import warnings
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, cast

from engine.errors import ConfigError

LONGEST = 1000
"""Characters of a pattern; names of modules and formats of answers take less."""

SECONDS = 3.0
"""The time that one pattern may take for all texts that it is compared with."""

_LEAST = 0.5
"""Seconds that a text has at least: they are of the clock, where others may work too."""

_SHORT = 256
"""Characters within which two repetitions are tried in no time."""

_MANY, _CHOICES = 3, 12
COUNT = re.compile(r"\{\d*(?:,\d*)?\}")
Groups = dict[str, str | None]
PARTS = re.compile(
    r"\\[pP]\{[^}]*\}|\\.|\[\^?\]?(?:\\.|\[:\^?\w+:\]|[^\]\\])*\]|\(\?[a-zA-Z<>=!:#P^-]*"
    r"|\{\d*(?:,\d*)?\}|[()|*+?]|[^\\\[(){|*+?]+|.",
    re.DOTALL,
)
_PROGRAM = """
import faulthandler, json, os, re, sys, time, warnings
warnings.simplefilter("ignore")
silent = open(os.devnull, "w")
for line in sys.stdin:
    pattern, flags, method, text, seconds = json.loads(line)
    faulthandler.dump_traceback_later(seconds, exit=True, file=silent)
    begun = time.process_time()
    match = getattr(re.compile(pattern, flags), method)(text)
    faulthandler.cancel_dump_traceback_later()
    groups = None if match is None else match.groupdict()
    print(json.dumps([groups, time.process_time() - begun]), flush=True)
"""


class PatternError(ValueError):
    """A text is no regular expression; the message says why."""


class SlowPatternError(ConfigError):
    """A regular expression takes too long."""


class Pattern:
    """A regular expression whose matches end in time.

    Raises `PatternError` for what is none, and matching `SlowPatternError` for one that does not.

    `SECONDS` are for all texts together or, with `each`, for each of them.
    """

    def __init__(self, text: str, flags: int = 0, each: bool = False) -> None:
        if len(text) > LONGEST:
            raise PatternError(f"it has {len(text)} characters, at most {LONGEST} are read")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                self._compiled = re.compile(text, flags)
        except (re.error, RecursionError, OverflowError) as error:
            raise PatternError(str(error)) from None
        self.text, self._flags, self._each = text, flags, each
        self._risky = may_backtrack(text)
        self._left = SECONDS

    def fullmatch(self, text: str) -> Groups | None:
        """The named groups of a match with all of `text`, or None."""
        return self._match("fullmatch", text)

    def match(self, text: str) -> Groups | None:
        """The named groups of a match with the beginning of `text`, or None."""
        return self._match("match", text)

    def search(self, text: str) -> Groups | None:
        """The named groups of the first match in `text`, or None."""
        return self._match("search", text)

    def _match(self, method: str, text: str) -> Groups | None:
        if not self._risky and len(text) <= _SHORT:
            match = getattr(self._compiled, method)(text)
            return None if match is None else match.groupdict()
        if self._each:
            self._left = SECONDS
        answer = None
        if self._left > 0:
            limit = max(self._left, _LEAST)
            answer = _WORKER.ask([self.text, self._flags, method, text, limit])
        if answer is None:
            self._left = 0.0
            raise SlowPatternError(
                f"The pattern `{self.text[:80]}` takes more than {SECONDS:g} s, with "
                f"{text[:80]!r} at last. Repetitions inside repetitions, as in (a+)+, double the "
                "time with each character: write it without them, or list names in its place."
            )
        groups, seconds = answer
        self._left -= seconds
        return cast(Groups | None, groups)


class _MatchingProcess:
    """The process that matches what may take long; started when it is needed."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None
        self._owner = 0

    def ask(self, request: list[Any]) -> list[Any] | None:
        """Groups and seconds of a request; None where its time was over."""
        with self._lock:
            process = self._running()
            assert process.stdin is not None and process.stdout is not None
            try:
                process.stdin.write(json.dumps(request) + "\n")
                process.stdin.flush()
                line = process.stdout.readline()
            except BrokenPipeError:
                line = ""
            if not line:
                self._end()
            return cast(list[Any], json.loads(line)) if line else None

    def _running(self) -> subprocess.Popen[str]:
        # A process that was forked has no share in the worker of the one that it comes from.
        if self._owner != os.getpid():
            self._process, self._owner = None, os.getpid()
        if self._process is not None and self._process.poll() is not None:
            self._end()
        if self._process is None:
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-S", "-c", _PROGRAM],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                encoding="utf-8",
                start_new_session=True,  # an interrupt from the keyboard is not for it
            )
        return self._process

    def end(self) -> None:
        """End the process, as this one ends."""
        if self._owner == os.getpid():
            self._end()

    def _end(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            # Leaving the block closes both pipes and waits; what it never read is of no use.
            with contextlib.suppress(BrokenPipeError), process:
                pass


_WORKER = _MatchingProcess()
atexit.register(_WORKER.end)


@lru_cache(maxsize=1024)
def pattern_of(text: str, flags: int = 0) -> Pattern:
    """The `Pattern` of a text, the same each time: its time is for all that it is used for."""
    return Pattern(text, flags)


@dataclass
class _Group:
    """What stands in a group so far: of this alternative, and the most of those before."""

    unbounded: int = 0
    choices: int = 0
    most_unbounded: int = 0
    most_choices: int = 0
    varies: bool = False
    """Whether it holds a quantifier or alternatives."""

    def next_alternative(self) -> None:
        self.most_unbounded = max(self.most_unbounded, self.unbounded)
        self.most_choices = max(self.most_choices, self.choices)
        self.unbounded = self.choices = 0


def may_backtrack(pattern: str) -> bool:
    """Whether a pattern may take much longer than its text is long; True where in doubt."""
    groups, closed, quantified = [_Group()], None, False
    for part in PARTS.findall(pattern):
        group = groups[-1]
        quantifier = part in "*+?" or COUNT.fullmatch(part) is not None
        if quantifier and quantified:
            quantified = False  # a quantifier that is lazy or possessive
            continue
        if (part[0] == "\\" and part[1:2] in tuple("123456789kg")) or part.startswith("(?P="):
            return True
        if quantifier:
            if part != "?" and closed is not None and closed.varies:
                return True
            group.varies = True
            if part in "*+" or part.endswith(",}"):
                group.unbounded += 1
            else:
                group.choices += 1
        elif part.startswith("("):
            groups.append(_Group())
        elif part == "|":
            group.next_alternative()
            group.varies = True
            group.choices += 1
        quantified = quantifier
        closed = None
        if part == ")" and len(groups) > 1:
            closed = groups.pop()
            closed.next_alternative()
            groups[-1].unbounded += closed.most_unbounded
            groups[-1].choices += closed.most_choices
            groups[-1].varies |= closed.varies
    whole = groups[0]
    whole.next_alternative()
    return whole.most_unbounded >= _MANY or whole.most_choices >= _CHOICES
