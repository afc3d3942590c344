"""summary.json of the verbs that write a model, or work for hours."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from engine.config.data_names.passwords import scrub
from engine.errors import ConfigError, EngineError
from engine.runs.signals import Interrupted
from engine.storage import durable
from engine.storage.safe_files import json_object_or_empty

SUMMARY = "summary.json"
_KINDS: dict[str, type | tuple[type, ...]] = {
    "verb": str,
    "status": str,
    "parameters": dict,
    "metrics": dict,
    "stopped": dict,
    "output_path": str,
    "error_message": str,
    "wall_seconds": (int, float),
    "total_steps": int,
    "machine": dict,
    "directory": str,
}


def read_record(path: Path) -> dict[str, Any]:
    """The `summary.json` or `manifest.json` in `path`; what is not of its kind is left out.

    Empty where there is none that can be read: a record tells, and decides nothing.
    """
    record = json_object_or_empty(path)
    return {
        key: value
        for key, value in record.items()
        if isinstance(value, _KINDS.get(key, object)) and not isinstance(value, bool)
    }


def refuse_other_summary(folder: Path, verb: str) -> None:
    """Raise `ConfigError` where the summary of another verb, or of somebody else, stands."""
    path = folder / SUMMARY
    if path.exists() and json_object_or_empty(path).get("verb") != verb:
        raise ConfigError(
            f"{path} stands already, and `engine {verb}` did not write it. Nothing was written; "
            "choose another --output-dir."
        )


def write_summary(
    folder: Path,
    verb: str,
    parameters: Mapping[str, Any],
    *,
    started: float,
    metrics: Mapping[str, Any] | None = None,
    output_path: Path | None = None,
    error_message: str | None = None,
    **more: Any,
) -> None:
    """Write what `verb` did in `folder`; with an `error_message` it failed.

    `started` is the time of its start, in seconds since the epoch. Raises `CheckpointError`.
    """
    content = {
        "verb": verb,
        "parameters": _plain(parameters),
        "status": "Success" if error_message is None else "Failure",
        "output_path": None if output_path is None else str(output_path),
        "error_message": scrub(error_message) if error_message else None,
        "metrics": _plain(dict(metrics or {})),
        "wall_seconds": round(time.time() - started, 3),
    }
    durable.write_json(folder / SUMMARY, content | more)


@contextmanager
def summed_up_on_failure(
    folder: Path, verb: str, parameters: Mapping[str, Any], started: float
) -> Iterator[None]:
    """Write the summary of a failure where the block raises; the failure goes on."""
    try:
        yield
    except BaseException as error:
        stopped = isinstance(error, Interrupted | KeyboardInterrupt)
        text = str(error) or ("Stopped by SIGINT." if stopped else type(error).__name__)
        known = stopped or isinstance(error, EngineError)
        message = text if known else f"{type(error).__name__}: {error}"
        more: dict[str, Any] = {"stopped": {"signal": "SIGINT", "step": None}} if stopped else {}
        if isinstance(error, Interrupted):
            more = {"stopped": error.facts()}
        try:
            write_summary(folder, verb, parameters, started=started, error_message=message, **more)
        except EngineError as second:
            error.add_note(f"The summary could not be written: {second}")
        raise


def _plain(value: Any) -> Any:
    """`value` as JSON has it: paths and types as text, what is not finite as null."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return value if abs(value) < float("inf") else None
    if value is None or isinstance(value, bool | int | str):
        return value
    return str(value).removeprefix("torch.")
