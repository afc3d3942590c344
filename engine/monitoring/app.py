"""The web application of engine board: a page and its endpoints.

Every endpoint only reads, and only below the directories that were named: a run is asked for by an
id of `RunDirectories`. Names, errors and samples are data; the page shows them as text.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from threading import Lock
from typing import Any

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from engine.errors import EngineError
from engine.monitoring import records
from engine.monitoring.confined import is_own_file, own_object
from engine.monitoring.directories import RunDirectories
from engine.monitoring.metrics_tail import MetricsTail
from engine.monitoring.overview import overview
from engine.monitoring.preview import MOST_ROWS, RowPreview
from engine.monitoring.series import series
from engine.pages.assets import json_answer, page_routes
from engine.pages.server import ADDRESS
from engine.serving.guards import Guard, rules_for_host

Answer = Callable[[Request], dict[str, Any]]


class AskedWrongly(Exception):
    """A request that cannot be answered: the message says why, `status` is HTTP's."""

    def __init__(self, message: str, status: int = 400) -> None:
        super().__init__(message)
        self.status = status


class Board:
    """What the page asks for. `planned(run)` is the memory in bytes that the run's plan needs."""

    def __init__(self, directories: RunDirectories, planned: Callable[[Path], int]) -> None:
        self.directories = directories
        self._planned = planned
        self._plans: dict[tuple[Path, int], dict[str, Any]] = {}
        self._planning = Lock()
        self._tails: dict[Path, MetricsTail] = {}
        self._preview = RowPreview()

    def app(self) -> Starlette:
        """The application, for an ASGI server."""
        answers: dict[str, Answer] = {
            "runs": self.runs,
            "series": self.series,
            "plan": self.plan,
            "settings": self.settings,
            "samples": lambda request: {"prompts": records.samples(self._run(request))},
            "forge": lambda request: {"models": records.forge(self._run(request))},
            "pruning": lambda request: {"maps": records.pruning(self._run(request))},
            "rows": self.rows,
        }
        routes = [Route(f"/api/{name}", _endpoint(answer)) for name, answer in answers.items()]
        guard = Middleware(Guard, rules_for_host(ADDRESS, (), (), None))
        return Starlette(routes=[*page_routes("board"), *routes], middleware=[guard])

    def runs(self, request: Request) -> dict[str, Any]:
        """All runs there are now, with state and newest figures."""
        listed = [
            {"id": run, "name": self.directories.name(path), **overview(path, self._tail(path))}
            for run, path in self.directories.scan().items()
        ]
        return {"folders": [str(path) for path in self.directories.folders], "runs": listed}

    def series(self, request: Request) -> dict[str, Any]:
        """The figures of one run, as few points as a chart needs."""
        smoothing = _number(request, "smoothing", 0.0, 0.0, 0.999)
        first = int(_number(request, "first", 0, 0, 1 << 53))
        last = int(_number(request, "last", 1 << 53, 0, 1 << 53))
        return series(self._tail(self._run(request)), smoothing, first, last)

    def plan(self, request: Request) -> dict[str, Any]:
        """The memory of the run's plan, noted by the run or made once; or why there is none."""
        run = self._run(request)
        noted = own_object(run / "manifest.json").get("planned_bytes")
        if type(noted) is int and noted > 0:
            return {"bytes": noted, "why": None}
        config = run / "config.yaml"
        if not is_own_file(config):
            return {"bytes": None, "why": "The run has no config.yaml to plan for."}
        key = run, config.stat().st_mtime_ns
        with self._planning:
            if key not in self._plans:
                try:
                    self._plans[key] = {"bytes": self._planned(run), "why": None}
                except (EngineError, ValueError, OSError) as error:
                    self._plans[key] = {"bytes": None, "why": str(error)}
            return self._plans[key]

    def settings(self, request: Request) -> dict[str, Any]:
        """The settings of several runs side by side."""
        runs = {run: self._by_id(run) for run in request.query_params.getlist("run")[:20]}
        return {"rows": records.compared(runs)}

    def rows(self, request: Request) -> dict[str, Any]:
        """Rows of a run's data as its model reads them."""
        part = request.query_params.get("part", "train")
        if part not in ("train", "heldout"):
            raise AskedWrongly(f"part is {part[:50]!r}; it should be train or heldout.")
        first = int(_number(request, "first", 1, 1, 1 << 53))
        count = int(_number(request, "count", 1, 1, MOST_ROWS))
        return self._preview.rows(self._run(request), part, first, count)

    def _run(self, request: Request) -> Path:
        return self._by_id(request.query_params.get("run", ""))

    def _by_id(self, run: str) -> Path:
        path = self.directories.path(run)
        if path is None:
            raise AskedWrongly(f"There is no run {run[:50]!r} (any more). Reload the page.", 404)
        return path

    def _tail(self, run: Path) -> MetricsTail:
        return self._tails.setdefault(run, MetricsTail(run / "metrics.jsonl"))


def _endpoint(answer: Answer) -> Callable[[Request], Response]:
    """A route's function, which starlette calls in a thread; an error is JSON with one sentence."""

    def endpoint(request: Request) -> Response:
        try:
            return json_answer(request, answer(request))
        except AskedWrongly as error:
            return json_answer(request, {"error": str(error)}, error.status)
        except (EngineError, OSError) as error:
            return json_answer(request, {"error": str(error)}, 422)

    return endpoint


def _number(request: Request, name: str, default: float, least: float, most: float) -> float:
    text = request.query_params.get(name)
    if text is None:
        return default
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not least <= value <= most:
        raise AskedWrongly(
            f"{name} is {text[:50]!r}; it should be a number from {least:g} to {most:g}."
        )
    return value
