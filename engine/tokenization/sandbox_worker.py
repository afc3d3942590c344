"""The program that renders chat templates in a process of its own.

A chat template comes with the model and is a program in Jinja's language. It is compiled in
Jinja's immutable sandbox with the settings, filters and globals that Hugging Face's
`apply_chat_template` uses, so that it gives the same text. The sandbox stops it from reaching
Python's objects; what a sandbox cannot stop (a gigabyte string, a loop without end, recursion) is
stopped by the limits this process sets on itself, and by the parent, which waits only so long.

It reads two lines of JSON on standard input for a request, its limits and the request itself (first
the template, then conversations), and answers each with one line:

    {"cpu_seconds": N, "memory_bytes": N, "output_chars": N}
    {"source": TEXT, "variables": {..}, "now": ISO DATE AND TIME | null}
    {"messages": [..], "marked": [..] | null, "tools": [..] | null, "kwargs": {..}, "jobs": [JOB]}

Several conversations may come as {"batch": [..]} and are answered by a list of such lists.

A job renders the first `count` messages (or, where it says `marked`, of that list), with or without
the generation prompt, and with the tools where it says `with_tools`; what is under `answer` is
added as the content of one more assistant message. The reply is
{"text": .., "spans": [[start, end], ..]} (what the template put between its generation tags) or
{"error": kind, "message": ..}. Only the standard library and jinja2 are imported.
"""

import json
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

try:
    import resource
except ImportError:  # Windows: there, only the parent's clock ends a runaway template.
    resource = None  # type: ignore[assignment]


class _OutputTooLong(Exception):
    pass


class GenerationTracker:
    """Counts the characters rendered so far and notes what the generation tags enclose."""

    def __init__(self) -> None:
        self.length = 0
        self.spans: list[tuple[int, int]] = []


class GenerationTag(jinja2.ext.Extension):
    """`{% generation %}..{% endgeneration %}` around what the model is to learn."""

    tags = {"generation"}  # noqa: RUF012 (jinja2 declares it so)

    def __init__(self, environment: jinja2.Environment) -> None:
        super().__init__(environment)
        self.tracker: GenerationTracker | None = None
        environment.extend(track_generation=self.track)

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        call = self.call_method("_enclosed")
        return jinja2.nodes.CallBlock(call, [], [], body).set_lineno(line)

    def _enclosed(self, caller: Callable[[], str]) -> str:
        text = caller()
        if self.tracker is not None:
            start = self.tracker.length
            self.tracker.spans.append((start, start + len(text)))
        return text

    @contextmanager
    def track(self) -> Iterator[GenerationTracker]:
        """Follow one rendering; the caller keeps the tracker's length up to date."""
        self.tracker = GenerationTracker()
        try:
            yield self.tracker
        finally:
            self.tracker = None


class _Dict:
    """`dict` for templates, without the type's attributes."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


class _Namespace(jinja2.utils.Namespace):
    """`namespace` for templates, which may not hold names that begin with an underscore."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, args = args[0], args[1:]
        attributes: dict[Any, Any] = dict(*args, **kwargs)
        for name in attributes:
            _refuse_underscore(name)
        jinja2.utils.Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _refuse_underscore(name)
        super().__setitem__(name, value)


def _refuse_underscore(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace may not hold {name!r}")


def _raise_exception(message: str) -> None:
    raise jinja2.exceptions.TemplateError(message)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


class _StrftimeNow:
    """`strftime_now` for templates: the present, or a fixed time so that a text can be repeated."""

    __slots__ = ("_fixed",)

    def __init__(self, fixed: str | None) -> None:
        self._fixed = None if fixed is None else datetime.fromisoformat(fixed)

    def __call__(self, form: str) -> str:
        return (self._fixed or datetime.now()).strftime(form)


def build_environment(now: str | None = None) -> ImmutableSandboxedEnvironment:
    """Jinja as Hugging Face sets it up for chat templates; `now` fixes what `strftime_now` says."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[GenerationTag, jinja2.ext.loopcontrols],
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _StrftimeNow(now)
    environment.globals["dict"] = _Dict()
    environment.globals["namespace"] = _Namespace
    return environment


def _limit_process(memory_bytes: int) -> None:
    """No more memory than this, no byte written to a file, no core dump."""
    if resource is None:
        return
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    if hard != resource.RLIM_INFINITY:
        memory_bytes = min(memory_bytes, hard)
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, hard))
    for kind in (resource.RLIMIT_FSIZE, resource.RLIMIT_CORE):
        resource.setrlimit(kind, (0, 0))


def _allow_cpu(seconds: int) -> None:
    """The kernel ends this process when it has used that much more processor time.

    The limit counts in whole seconds, the timer to the millisecond.
    """
    if resource is None:
        return
    signal.setitimer(signal.ITIMER_PROF, seconds)
    used = resource.getrusage(resource.RUSAGE_SELF)
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    limit = int(used.ru_utime + used.ru_stime) + 1 + seconds
    resource.setrlimit(resource.RLIMIT_CPU, (limit, hard))


class Renderer:
    """One compiled template with the variables that every rendering gets."""

    def __init__(self, source: str, variables: dict[str, Any], now: str | None) -> None:
        self.environment = build_environment(now)
        self.template = self.environment.from_string(source)
        self.variables = variables
        self.output_chars = 0

    def answers(self, request: dict[str, Any]) -> list[dict[str, Any]]:
        """Do the jobs of a request."""
        return [self.answer(request, job) for job in request["jobs"]]

    def answer(self, request: dict[str, Any], job: dict[str, Any]) -> dict[str, Any]:
        """Do one job of a request; a fault of the template becomes part of the answer."""
        messages = request["marked" if job["marked"] else "messages"][: job["count"]]
        if job["answer"] is not None:
            messages.append({"role": "assistant", "content": job["answer"]})
        variables = {
            **self.variables,
            **request["kwargs"],
            "messages": messages,
            "tools": request["tools"] if job["with_tools"] else None,
            "documents": None,
            "add_generation_prompt": job["generation_prompt"],
        }
        try:
            text, spans = self._render(variables)
        except Exception as error:
            return describe(error)
        return {"text": text, "spans": spans}

    def _render(self, variables: dict[str, Any]) -> tuple[str, list[tuple[int, int]]]:
        pieces: list[str] = []
        with self.environment.track_generation() as tracker:  # type: ignore[attr-defined]
            for piece in self.template.generate(**variables):
                pieces.append(piece)
                tracker.length += len(piece)
                if tracker.length > self.output_chars:
                    raise _OutputTooLong(f"more than {self.output_chars} characters of output")
            return "".join(pieces), tracker.spans


def describe(error: BaseException) -> dict[str, Any]:
    """An exception as a JSON value: whether it is the sandbox, a limit, or the template itself."""
    kind = "template"
    if isinstance(error, jinja2.exceptions.SecurityError):
        kind = "security"
    elif isinstance(error, MemoryError | RecursionError | OverflowError | _OutputTooLong):
        kind = "limit"
    elif isinstance(error, jinja2.exceptions.TemplateSyntaxError):
        kind = "syntax"
    message = str(error).rstrip(".") or type(error).__name__
    if isinstance(error, TypeError) and message.startswith("no loader"):
        kind, message = "security", "it asks for another file"
    elif isinstance(error, jinja2.exceptions.TemplateSyntaxError):
        message = f"line {error.lineno}: {message}"
    elif not isinstance(error, jinja2.exceptions.TemplateError | MemoryError | _OutputTooLong):
        message = f"{type(error).__name__}: {message}"
    return {"error": kind, "message": message[:2000]}


def _reply(answer: Any) -> None:
    sys.stdout.write(json.dumps(answer))
    sys.stdout.write("\n")
    sys.stdout.flush()


def _next_request() -> tuple[dict[str, Any], dict[str, Any]] | None:
    """Limits, already set, and the request that they are for; None at the end of the input."""
    line = sys.stdin.readline()
    if not line:
        return None
    limits = json.loads(line)
    _limit_process(limits["memory_bytes"])
    _allow_cpu(limits["cpu_seconds"])
    return limits, json.loads(sys.stdin.readline())


def serve() -> None:
    """Compile the template of the first request, then answer every further one."""
    first = _next_request()
    if first is None:
        return
    try:
        renderer = Renderer(**first[1])
    except Exception as error:
        _reply(describe(error))
        return
    _reply({"ready": True})
    while (following := _next_request()) is not None:
        limits, request = following
        renderer.output_chars = limits["output_chars"]
        if "batch" in request:
            _reply([renderer.answers(each) for each in request["batch"]])
        else:
            _reply(renderer.answers(request))


if __name__ == "__main__":
    serve()
