"""Progress bar and log lines.

The bar shows the step, loss, real tokens per second, peak memory and the time left, all taken from
the `StepMetrics` that also go to `metrics.jsonl`. A terminal that goes away ends the bar and never
the run. In a notebook a bar with a table of the evaluations stands below the cell.
"""

import html
import importlib
import logging
import sys
import time
from typing import IO, Any, Self, TextIO, cast

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from engine.runs.metrics import StepMetrics, describe_seconds

log = logging.getLogger(__name__)

_REDRAWN = 0.25
"""Seconds between drawings of a notebook's bar."""
_MOST_ROWS = 100


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


def notebook_display() -> Any | None:
    """IPython's `display` module in a notebook; None elsewhere, without importing IPython."""
    ipython = sys.modules.get("IPython")
    ask = getattr(ipython, "get_ipython", None)
    shell = ask() if callable(ask) else None
    # A shell in a terminal has no kernel; those of Jupyter, Colab and VS Code have one.
    if shell is None or getattr(shell, "kernel", None) is None:
        return None
    try:
        return importlib.import_module("IPython.display")
    except ImportError:
        return None


class NotebookBar:
    """A bar below a notebook's cell, with a row for each evaluation; redrawn a few times a second.

    What a notebook refuses to show ends the bar and never the run.
    """

    def __init__(self, display: Any, total_steps: int) -> None:
        self._display, self._total = display, total_steps
        self._rows: list[dict[str, Any]] = []
        self._handle: Any = None
        self._drawn = 0.0

    def update(self, metrics: StepMetrics) -> None:
        """Show one step."""
        figures = {name: value for name, value in metrics.extra.items() if name.startswith("eval_")}
        if figures:
            self._rows.append({"step": metrics.step, "loss": metrics.loss, **figures})
        now = time.monotonic()
        if figures or metrics.step == self._total or now - self._drawn > _REDRAWN:
            self._drawn = now
            self._show(self._page(metrics))

    def _page(self, metrics: StepMetrics) -> str:
        text = html.escape(f"step {metrics.step}/{self._total}  {describe_step(metrics)}")
        bar = f'<progress value="{metrics.step}" max="{self._total}"></progress>'
        return f"<div>{bar} {text}</div>{self._table()}"

    def _table(self) -> str:
        if not self._rows:
            return ""
        names = list(dict.fromkeys(name for row in self._rows for name in row))
        head = "".join(f"<th>{html.escape(name)}</th>" for name in names)
        body = "".join(
            "<tr>" + "".join(f"<td>{_cell(row.get(name))}</td>" for name in names) + "</tr>"
            for row in self._rows[-_MOST_ROWS:]
        )
        return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"

    def _show(self, page: str) -> None:
        if self._display is None:
            return
        try:
            content = self._display.HTML(page)
            if self._handle is None:
                self._handle = self._display.display(content, display_id=True)
            else:
                self._handle.update(content)
        except Exception as error:
            self._display = None
            log.warning("The notebook's bar ends: %s", error)


def _cell(value: Any) -> str:
    return "" if value is None else f"{value:.4f}" if isinstance(value, float) else str(value)


class ProgressReporter:
    """A context that shows the steps of a run from `start_step` to `total_steps`.

    Off a terminal and a notebook, or with `live` False, it logs a line every `log_every` steps and
    at the last.
    """

    def __init__(
        self, total_steps: int, start_step: int = 0, *, log_every: int = 10, live: bool = True
    ) -> None:
        self.total_steps = total_steps
        self.log_every = log_every
        self._first = start_step + 1
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._notebook: NotebookBar | None = None
        stream = QuietStream(sys.stderr)
        display = notebook_display() if live else None
        if display is not None:
            self._notebook = NotebookBar(display, total_steps)
        elif live and stream.isatty():
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
        elif self._notebook is not None:
            log.debug(line)
            self._notebook.update(metrics)
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
