"""Counters and histograms of the server, in Prometheus' text format.

https://prometheus.io/docs/instrumenting/exposition_formats/
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)


@dataclass
class Counter:
    """A sum that only grows, one for each set of labels."""

    name: str
    text: str
    labels: tuple[str, ...] = ()
    values: dict[tuple[str, ...], float] = field(default_factory=dict)

    def lines(self) -> Iterator[str]:
        yield f"# HELP {self.name} {self.text}"
        yield f"# TYPE {self.name} counter"
        if not self.labels:
            yield f"{self.name} {_number(self.values.get((), 0.0))}"
            return
        for key, value in sorted(self.values.items()):
            yield f"{self.name}{_labels(self.labels, key)} {_number(value)}"


@dataclass
class Histogram:
    """How many observations were at most as large as each bound, and their sum."""

    name: str
    text: str
    bounds: Sequence[float] = _SECONDS
    counts: list[int] = field(default_factory=list)
    total: float = 0.0

    def lines(self) -> Iterator[str]:
        counts = self.counts or [0] * (len(self.bounds) + 1)
        yield f"# HELP {self.name} {self.text}"
        yield f"# TYPE {self.name} histogram"
        below = 0
        for bound, count in zip((*map(str, self.bounds), "+Inf"), counts, strict=True):
            below += count
            yield f'{self.name}_bucket{{le="{bound}"}} {below}'
        yield f"{self.name}_sum {_number(self.total)}"
        yield f"{self.name}_count {below}"


class Metrics:
    """What the server counts. Every method may be called from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._gauges: list[tuple[str, str, Callable[[], float]]] = []
        self.requests = Counter(
            "engine_http_requests_total", "Requests, by route and status.", ("route", "status")
        )
        self.finished = Counter("engine_answers_total", "Answers, by what ended them.", ("reason",))
        self.prompt_tokens = Counter("engine_prompt_tokens_total", "Tokens of prompts.")
        self.tokens = Counter("engine_generated_tokens_total", "Tokens of answers.")
        self.first_token = Histogram(
            "engine_time_to_first_token_seconds", "From a request's arrival to its first token."
        )
        self.duration = Histogram(
            "engine_request_duration_seconds", "From a request's arrival to its answer's end."
        )

    def gauge(self, name: str, text: str, read: Callable[[], float]) -> None:
        """Add a number that is asked for whenever the metrics are read."""
        self._gauges.append((name, text, read))

    def count(self, counter: Counter, *labels: str, by: float = 1.0) -> None:
        with self._lock:
            counter.values[labels] = counter.values.get(labels, 0.0) + by

    def observe(self, histogram: Histogram, value: float) -> None:
        with self._lock:
            histogram.counts = histogram.counts or [0] * (len(histogram.bounds) + 1)
            bucket = next((i for i, b in enumerate(histogram.bounds) if value <= b), -1)
            histogram.counts[bucket] += 1
            histogram.total += value

    def text(self) -> str:
        """All of it, as `/metrics` answers."""
        lines: list[str] = []
        with self._lock:
            for counter in (self.requests, self.finished, self.prompt_tokens, self.tokens):
                lines += counter.lines()
            for histogram in (self.first_token, self.duration):
                lines += histogram.lines()
        for name, text, read in self._gauges:
            lines += [f"# HELP {name} {text}", f"# TYPE {name} gauge", f"{name} {_number(read())}"]
        return "\n".join(lines) + "\n"


def _number(value: float) -> str:
    return str(int(value)) if value == int(value) else repr(value)


def _labels(names: Sequence[str], values: Sequence[str]) -> str:
    pairs = (f'{name}="{_escaped(value)}"' for name, value in zip(names, values, strict=True))
    return "{" + ",".join(pairs) + "}"


def _escaped(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
