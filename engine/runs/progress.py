"""Progress bar and log lines.

The bar shows the step, loss, real tokens per second, peak memory and the time left, all taken from
the `StepMetrics` that also go to `metrics.jsonl`. A terminal that goes away ends the bar and never
the run.
"""

import logging
import sys
from typing import IO, Self, TextIO, cast

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from engine.runs.metrics import StepMetrics, describe_seconds

log = logging.getLogger(__name__)


class QuietStream:
    """A text stream that drops what its stream refuses to take."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.closed = False
        self.encoding = getattr(stream, "encoding", None) or "utf-8"

    def write(self, text: str) -> int:
        """Write `text` if the stream is still there."""
        if not self.closed:
            try:
                self._stream.write(text)
            except (OSError, ValueError):
                self.closed = True
        return len(text)

    def flush(self) -> None:
        """Flush if the stream is still there."""
        if not self.closed:
            try:
                self._stream.flush()
            except (OSError, ValueError):
                self.closed = True

    def isatty(self) -> bool:
        """Whether the stream is a terminal."""
        try:
            return self._stream.isatty()
        except ValueError:
            return False

    def fileno(self) -> int:
        """The stream's file descriptor."""
        return self._stream.fileno()


class ProgressReporter:
    """A context that shows the steps of a run from `start_step` to `total_steps`.

    Off a terminal, or with `live` False, it logs a line every `log_every` steps and at the last.
    """

    def __init__(
        self, total_steps: int, start_step: int = 0, *, log_every: int = 10, live: bool = True
    ) -> None:
        self.total_steps = total_steps
        self.log_every = log_every
        self._first = start_step + 1
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        stream = QuietStream(sys.stderr)
        if live and stream.isatty():
            self._bar = Progress(
                TextColumn("step {task.completed:.0f}/{task.total:.0f}"),
                BarColumn(bar_width=None),
                TextColumn("{task.description}"),
                console=Console(file=cast(IO[str], stream), force_terminal=True),
                expand=True,
            )
            self._task = self._bar.add_task("", total=total_steps, completed=start_step)

    def update(self, metrics: StepMetrics) -> None:
        """Show one step."""
        text = describe_step(metrics)
        due = metrics.step % self.log_every == 0 or metrics.step in (self._first, self.total_steps)
        line = f"step {metrics.step}/{self.total_steps}  {text}"
        if self._bar is not None and self._task is not None:
            log.debug(line)
            self._bar.update(self._task, completed=metrics.step, description=text)
        else:
            log.log(logging.INFO if due else logging.DEBUG, line)

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *raised: object) -> None:
        if self._bar is not None:
            self._bar.stop()


def describe_step(metrics: StepMetrics) -> str:
    """One step in words: `loss 1.2345  310 tok/s  1.2 GiB  3:07 left`."""
    loss = "skipped" if metrics.loss is None else f"loss {metrics.loss:.4f}"
    speed = metrics.tokens_per_second
    parts = [
        loss,
        f"{speed:,.0f} tok/s" if speed is not None else "- tok/s",
        f"{metrics.peak_memory_bytes / 2**30:.2f} GiB",
        f"{describe_seconds(metrics.eta_seconds)} left",
    ]
    if metrics.skipped:
        parts.append(f"{metrics.skipped} skipped")
    return "  ".join(parts)
