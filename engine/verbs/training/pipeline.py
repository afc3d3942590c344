"""`engine pipeline`: verbs in an order, each done once."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engine.config.tasks.workflow import PipelineSettings
from engine.errors import ConfigError, listing, without_controls
from engine.pipelines.process import run_stage
from engine.pipelines.recipe import Recipe, read_recipe
from engine.pipelines.records import StageRecord
from engine.runs.summary import refuse_other_summary, write_summary
from engine.storage import names
from engine.storage.lock import DirectoryLock

log = logging.getLogger(__name__)

OnEvent = Callable[[Mapping[str, Any]], None]


@dataclass
class PipelineResult:
    """How far a pipeline came: `status` is the exit status of the stage that failed, or 0."""

    directory: Path
    done: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    failed: str | None = None
    status: int = 0


def pipeline(settings: PipelineSettings, on_event: OnEvent | None = None) -> PipelineResult:
    """Run the stages of a file that have not been done, until one fails.

    `on_event` takes what happens, as it happens: `pipeline_begins`, `stage_begins`, `stage_ends`,
    `stage_skipped`, `pipeline_ends`. Raises `ConfigError` or `CheckpointError`.
    """
    recipe = read_recipe(Path(settings.file), settings.output_dir, settings.set)
    again = _again(recipe, settings.again)
    tell = on_event or (lambda _: None)
    started = time.time()
    refuse_other_summary(recipe.output_dir, "pipeline")
    names.mkdir(recipe.output_dir, parents=True, exist_ok=True)
    result = PipelineResult(recipe.output_dir)
    with DirectoryLock(recipe.output_dir):
        tell(_event("pipeline_begins", stages=[stage.name for stage in recipe.stages]))
        for index, stage in enumerate(recipe.stages):
            record = StageRecord(recipe.output_dir, stage)
            if index < again and record.is_done():
                record.settle()
                _say_what_changed(record)
                result.skipped.append(stage.name)
                tell(_event("stage_skipped", stage=stage.name))
                continue
            again = min(again, index)  # What stands on a stage that is done anew is done anew.
            tell(_event("stage_begins", stage=stage.name, verb=stage.verb))
            begun = time.monotonic()
            status, message = run_stage(
                stage, record.begin(), record.folder, quiet=settings.events == "jsonl"
            )
            files = stage.files() if status == 0 else ()
            facts = record.end(status, time.monotonic() - begun, message, files)
            tell(_event("stage_ends", **facts))
            if status != 0:
                result.failed, result.status = stage.name, status
                break
            result.done.append(stage.name)
        _summarise(recipe, settings, result, started)
        tell(_event("pipeline_ends", failed=result.failed, exit_status=result.status))
    return result


def _say_what_changed(record: StageRecord) -> None:
    if changed := record.changed():
        log.warning(
            "the stage %s is done, and %s changed since: it is not done again unless "
            "--again %s asks for it",
            record.stage.name, listing(map(str, changed)), record.stage.name,
        )  # fmt: skip


def _again(recipe: Recipe, name: str | None) -> int:
    """The index of the first stage that is done anew whatever is there."""
    names = [stage.name for stage in recipe.stages]
    if name is None:
        return len(names)
    if name not in names:
        raise ConfigError(f"There is no stage {name!r} to do again; stages: {', '.join(names)}.")
    return names.index(name)


def _summarise(
    recipe: Recipe, settings: PipelineSettings, result: PipelineResult, started: float
) -> None:
    failure = None if result.failed is None else f"The stage {result.failed} failed."
    write_summary(
        recipe.output_dir,
        "pipeline",
        {"file": settings.file, "stages": [stage.name for stage in recipe.stages]},
        started=started,
        metrics={"done": len(result.done), "skipped": len(result.skipped)},
        output_path=recipe.output_dir,
        error_message=failure,
    )


def _event(kind: str, **facts: Any) -> dict[str, Any]:
    return {"event": kind, "time": round(time.time(), 3), **facts}


def told(event: Mapping[str, Any]) -> None:
    """Write an event to standard output, in words."""
    kind, stage = event["event"], event.get("stage")
    if kind == "stage_begins":
        print(f"== {without_controls(str(stage))}: engine {event['verb']}", flush=True)
    elif kind == "stage_skipped":
        print(f"== {stage}: done before", flush=True)
    elif kind == "stage_ends":
        print(f"== {stage}: {event['status']} in {event['wall_seconds']:.1f} s", flush=True)


def print_event(event: Mapping[str, Any]) -> None:
    """Write an event to standard output, a line of JSON."""
    print(json.dumps(event, ensure_ascii=False, default=str), flush=True)
