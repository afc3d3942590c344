"""Start, feed and stop the process that renders chat templates.

One process serves one template for as long as that template is used: starting costs about a tenth
of a second, a rendering some tens of microseconds more than it would here.
"""

import json
import os
import subprocess
import sys
import threading
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jinja2
import markupsafe

from engine.errors import DataError

MAX_SOURCE_BYTES = 256 * 2**10
_KERNEL_LIMITS_CPU = find_spec("resource") is not None
_WORKER = Path(__file__).with_name("sandbox_worker.py")


@dataclass(frozen=True)
class Limits:
    """What one request to the template process may use.

    Attributes:
        cpu_seconds: processor time, enforced by the kernel to the next full second.
        wall_seconds: time until an answer, where the kernel has no such limit (Windows).
        memory_bytes: address space of the process.
        output_chars: length of one rendered text.
    """

    cpu_seconds: int = 2
    wall_seconds: float = 10.0
    memory_bytes: int = 512 * 2**20
    output_chars: int = 32 * 2**20


@dataclass(frozen=True)
class Job:
    """One rendering: of the first `count` messages, with the words of one exchanged or none."""

    count: int
    generation_prompt: bool = False
    replace: tuple[int, str] | None = None


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
        self._start = {
            "source": source,
            "variables": dict(variables),
            "now": now,
            "cpu_seconds": limits.cpu_seconds,
            "memory_bytes": limits.memory_bytes,
            "output_chars": limits.output_chars,
        }

    def render(
        self,
        messages: list[dict[str, Any]],
        tools: list[dict[str, Any]] | None,
        kwargs: Mapping[str, Any],
        jobs: list[Job],
    ) -> list[Rendered]:
        """Do several renderings of one conversation.

        Raises:
            DataError: the template is not valid, broke a limit, or tried to leave the sandbox.
                What a template says about one conversation comes back as `Rendered.error`.
        """
        request = {
            "messages": messages,
            "tools": tools,
            "kwargs": dict(kwargs),
            "jobs": [
                {
                    "count": job.count,
                    "generation_prompt": job.generation_prompt,
                    "replace": job.replace,
                }
                for job in jobs
            ],
        }
        with self._lock:
            if self._process is None or self._process.poll() is not None:
                self._process = self._launch()
                self._check(self._exchange(self._process, self._start))
            answers = self._exchange(self._process, request)
        return [self._check(answer) for answer in answers]

    def close(self) -> None:
        """End the process; a later `render` starts a new one."""
        with self._lock:
            if self._process is not None:
                _end(self._process)
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
        weakref.finalize(self, _end, process)
        return process

    def _exchange(self, process: subprocess.Popen[str], request: Any) -> Any:
        """Send one line and wait for one; a process that dies or overruns is a DataError."""
        assert process.stdin is not None
        assert process.stdout is not None
        with self._clock(process):
            try:
                process.stdin.write(json.dumps(request) + "\n")
                process.stdin.flush()
                line = process.stdout.readline()
            except BrokenPipeError:
                line = ""
        if not line.endswith("\n"):
            raise self._stopped(process)
        return json.loads(line)

    @contextmanager
    def _clock(self, process: subprocess.Popen[str]) -> Iterator[None]:
        """Kill the process when it takes too long, where the kernel does not limit its CPU time.

        A template computes and never waits, so where there is a CPU limit the clock would add
        nothing but the start of a thread for every row.
        """
        if _KERNEL_LIMITS_CPU:
            yield
            return
        timer = threading.Timer(self._limits.wall_seconds, process.kill)
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    def _stopped(self, process: subprocess.Popen[str]) -> DataError:
        """Why a process gave no answer, told by how it ended."""
        try:
            status = process.wait(timeout=1)
        except subprocess.TimeoutExpired:
            status = None
        _end(process)
        if status is not None and status > 0:
            return DataError(
                f"{self._name} could not be rendered: the process that renders templates ended "
                f"with status {status}. Check that this Python can import jinja2."
            )
        return DataError(
            f"{self._name} was stopped: it used more than {self._limits.cpu_seconds} s of "
            f"processor time or {self._limits.memory_bytes >> 20} MiB of memory for one "
            "conversation. Templates are programs that come with the model and run inside "
            "limits; use a template that ends, or a model from a source you trust."
        )

    def _check(self, answer: dict[str, Any]) -> Rendered:
        kind, message = answer.get("error"), answer.get("message", "")
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
            raise DataError(
                f"{self._name} broke a limit of the sandbox that templates run in: {message}. "
                "Use a template that writes the conversation and nothing else."
            )
        if kind == "syntax":
            raise DataError(
                f"{self._name} is not a valid Jinja template: {message}. Fix the template."
            )
        return Rendered(error=message)


def _end(process: subprocess.Popen[str]) -> None:
    """Kill a process that holds nothing worth saving, and collect it."""
    if process.poll() is None:
        process.kill()
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            try:
                stream.close()
            except BrokenPipeError:
                continue  # Unsent bytes to a process that has ended are of no use.
    process.wait()
