"""Start, feed and stop the process that renders chat templates.

One process serves one template for as long as that template is used: starting costs about a tenth
of a second, a rendering some tens of microseconds more than it would here.
"""

import json
import os
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jinja2
import markupsafe

from engine.errors import DataError, printable
from engine.tokenization.messages import LimitError
from engine.tokenization.vocabularies import answering_process

MAX_SOURCE_BYTES = 256 * 2**10
_KERNEL_LIMITS_CPU = find_spec("resource") is not None
_LIMIT_SIGNALS = (
    0, signal.SIGKILL, *(getattr(signal, n, signal.SIGKILL) for n in ("SIGXCPU", "SIGPROF"))
)  # fmt: skip
_CHARS_PER_SECOND = 50_000
_BYTES_PER_CHAR = 64
_OUTPUT_PER_CHAR = 16
_SHOWN = 400
"""Characters of a template's own words that a message shows."""
_WORKER = Path(__file__).with_name("sandbox_worker.py")


@dataclass(frozen=True)
class Limits:
    """What one request to the template process may use.

    Attributes:
        cpu_seconds: processor time, enforced by the kernel.
        wall_seconds: time until an answer, where the kernel has no such limit (Windows).
        memory_bytes: address space of the process.
        output_chars: length of one rendered text.
    """

    cpu_seconds: int = 2
    wall_seconds: float = 10.0
    memory_bytes: int = 512 * 2**20
    output_chars: int = 32 * 2**20

    def for_request(self, size: int) -> "Limits":
        """The limits of a request of `size` characters: a longer conversation may use more."""
        seconds = size // _CHARS_PER_SECOND
        return Limits(
            self.cpu_seconds + seconds,
            self.wall_seconds + seconds,
            self.memory_bytes + _BYTES_PER_CHAR * size,
            self.output_chars + _OUTPUT_PER_CHAR * size,
        )


@dataclass(frozen=True)
class Job:
    """One rendering: of the first `count` messages, then of one more answer where one is given.

    Attributes:
        count: messages, from the first.
        generation_prompt: end with the beginning of an assistant turn.
        marked: of the marked messages.
        answer: content of a further assistant message, or None for none.
        with_tools: hand the tools to the template.
    """

    count: int
    generation_prompt: bool = False
    marked: bool = False
    answer: Any = None
    with_tools: bool = True


@dataclass(frozen=True)
class TemplateInput:
    """What a template is given.

    Attributes:
        messages: as templates get them.
        tools: JSON schemas of callable tools.
        kwargs: further variables.
        marked: the messages with markers, for jobs that ask for them.
    """

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None
    kwargs: dict[str, Any] = field(default_factory=dict)
    marked: list[dict[str, Any]] | None = None


@dataclass(frozen=True)
class Rendered:
    """What a job gave: a text and its generation-tag spans, or the template's complaint."""

    text: str = ""
    spans: tuple[tuple[int, int], ...] = ()
    error: str | None = None


class TemplateProcess:
    """A running template process. Not safe to share between processes; threads take turns."""

    def __init__(
        self,
        source: str,
        variables: Mapping[str, str],
        limits: Limits,
        name: str,
        now: str | None = None,
    ) -> None:
        self._name, self._limits = name, limits
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None
        self._start = json.dumps({"source": source, "variables": dict(variables), "now": now})

    def render(
        self,
        conversation: TemplateInput,
        jobs: list[Job],
    ) -> list[Rendered]:
        """Do several renderings of one conversation.

        Raises:
            LimitError: the template broke a limit on this conversation.
            DataError: the template is not valid, or tried to leave the sandbox. What it says
                about one conversation comes back as `Rendered.error`.
        """
        request = json.dumps(self._request(conversation, jobs))
        with self._lock:
            self._ensure_running()
            assert self._process is not None
            limits = self._limits.for_request(len(request))
            answers = self._exchange(self._process, request, limits)
            if answers is None:
                answering_process.end(self._process)
                raise self._stopped(limits)
        return [self._check(answer) for answer in answers]

    def _request(self, conversation: TemplateInput, jobs: list[Job]) -> dict[str, Any]:
        return {
            "messages": conversation.messages,
            "marked": conversation.marked,
            "tools": conversation.tools,
            "kwargs": conversation.kwargs,
            "jobs": [vars(job) for job in jobs],
        }

    def _ensure_running(self) -> None:
        """Start the process unless it runs, and give it the template."""
        if self._process is not None and self._process.poll() is None:
            return
        self._process = self._launch()
        answer = self._exchange(self._process, self._start, self._limits)
        if answer is None:
            raise self._unusable(self._process)
        self._check(answer)

    def render_each(self, conversations: list[TemplateInput]) -> list[Rendered | None]:
        """Render several conversations whole, in one request.

        None for all of them where the template does not do it within the limits, and for one that
        it refuses: `render` says why.
        """
        if not conversations:
            return []
        batch = [self._request(conversation, [Job(len(conversation.messages))])
                 for conversation in conversations]  # fmt: skip
        request = json.dumps({"batch": batch})
        with self._lock:
            self._ensure_running()
            assert self._process is not None
            answers = self._exchange(self._process, request, self._limits.for_request(len(request)))
            if answers is None:
                answering_process.end(self._process)
                return [None] * len(conversations)
        return [None if "error" in a else self._check(a) for (a,) in answers]

    def close(self) -> None:
        """End the process; a later `render` starts a new one."""
        with self._lock:
            if self._process is not None:
                answering_process.end(self._process)
                self._process = None

    def _launch(self) -> subprocess.Popen[str]:
        if not sys.executable:
            raise DataError(
                f"{self._name} cannot be rendered: this program does not know which Python runs "
                "it, and templates are rendered in a Python process of their own."
            )
        folders = dict.fromkeys(str(Path(m.__path__[0]).parent) for m in (jinja2, markupsafe))
        environment = {"PYTHONPATH": os.pathsep.join(folders), "PYTHONIOENCODING": "utf-8"}
        for key in ("TZ", "LC_TIME", "LC_ALL", "SYSTEMROOT"):
            if key in os.environ:
                environment[key] = os.environ[key]
        process = subprocess.Popen(
            [sys.executable, "-P", "-s", str(_WORKER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            encoding="utf-8",
            env=environment,
            # Ctrl-C in the terminal is for the parent, which may want to finish its step.
            start_new_session=True,
        )
        weakref.finalize(self, answering_process.end, process)
        return process

    def _exchange(self, process: subprocess.Popen[str], line: str, limits: Limits) -> Any:
        """Send limits and one line, and wait for one; None from a process that died or overran."""
        with _clock(process, limits.wall_seconds):
            answer = answering_process.ask(process, f"{json.dumps(vars(limits))}\n{line}")
        return None if answer is None else json.loads(answer)

    def _unusable(self, process: subprocess.Popen[str]) -> DataError:
        """Why a process that was just started says nothing."""
        try:
            status = process.wait(timeout=1)
        except subprocess.TimeoutExpired:
            status = 0
        answering_process.end(process)
        if status <= 0 and -status in _LIMIT_SIGNALS:
            return self._stopped(self._limits)
        if status < 0:
            return DataError(
                f"{self._name} could not be compiled: the process that renders templates was ended "
                f"by signal {-status}, as where expressions are nested without end. Use a template "
                "of a usual size, or a model from a source you trust."
            )
        return DataError(
            f"{self._name} could not be rendered: the process that renders templates ended "
            f"with status {status}. Check that this Python can import jinja2."
        )

    def _stopped(self, limits: Limits) -> LimitError:
        return LimitError(
            f"{self._name} was stopped: it used more than {limits.cpu_seconds} s of "
            f"processor time or {limits.memory_bytes >> 20} MiB of memory for one "
            "conversation. Templates are programs that come with the model and run inside "
            "limits, which grow with the conversation; use a template that ends, or a model from "
            "a source you trust."
        )

    def _check(self, answer: dict[str, Any]) -> Rendered:
        kind, message = answer.get("error"), printable(str(answer.get("message", "")), _SHOWN)
        if kind is None:
            spans = tuple((int(start), int(end)) for start, end in answer.get("spans", ()))
            return Rendered(answer.get("text", ""), spans)
        if kind == "security":
            raise DataError(
                f"{self._name} tried to leave the sandbox that templates run in: {message}. A "
                "template needs nothing but the messages; this model's template is broken or "
                "hostile. Do not use it, or replace its chat_template."
            )
        if kind == "limit":
            raise LimitError(
                f"{self._name} broke a limit of the sandbox that templates run in: {message}. "
                "Use a template that writes the conversation and nothing else."
            )
        if kind == "syntax":
            raise DataError(
                f"{self._name} is not a valid Jinja template: {message}. Fix the template."
            )
        return Rendered(error=message)


@contextmanager
def _clock(process: subprocess.Popen[str], seconds: float) -> Iterator[None]:
    """Kill the process when it takes too long, where the kernel does not limit its CPU time.

    A template computes and never waits, so where there is a CPU limit the clock would add
    nothing but the start of a thread for every row.
    """
    if _KERNEL_LIMITS_CPU:
        yield
        return
    timer = threading.Timer(seconds, process.kill)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
