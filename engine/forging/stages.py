"""Run a long job in stages, each done once and remembered.

A stage's result is a JSON object in `stages/<name>.json`, written when the stage is complete. A job
that starts again reads it there instead of doing the stage over; the stage in which it was stopped
runs anew and must be able to.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import secrets
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from engine.config.settings import with_present_names
from engine.errors import CheckpointError, ConfigError
from engine.storage import durable, names
from engine.storage.safe_files import read_json_object

log = logging.getLogger(__name__)
JOB = "job.json"
_DIGEST = "self_sha256"
_LONGEST = 1 << 28
"""Bytes of a record, which may have the losses of many rows."""
Upgrade = Callable[[dict[str, Any]], dict[str, Any]]


class Stages:
    """The stages of the job in `directory`, which belong to one set of settings."""

    def __init__(
        self,
        directory: Path,
        settings: dict[str, Any],
        *,
        resume: bool,
        renamed: Mapping[str, str] | None = None,
        upgraded: Upgrade | None = None,
    ) -> None:
        """Start a job, or go on with one, whose settings may have the earlier names of `renamed`,
        and be put into today's form by `upgraded`.

        Raises `ConfigError` where a job is there and `resume` was not asked for, where it has other
        settings, and where the directory cannot be made.
        """
        check_job(directory, settings, resume=resume, renamed=renamed, upgraded=upgraded)
        self.directory = directory
        make_directory(directory / "stages")
        if not _has_done(directory):
            durable.write_json(directory / JOB, settings)

    def run(self, name: str, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The result of the stage `name`, from its file if it is done and the file is whole."""
        path = self.directory / "stages" / f"{name}.json"
        if path.exists() or path.is_symlink():
            try:
                done = _result(path)
            except CheckpointError as error:
                log.warning("%s: is done again, for its record cannot be used: %s", name, error)
                names.rename(path, path.with_name(f".bad-{path.name}-{secrets.token_hex(4)}"))
            else:
                log.info("%s: done before", name)
                return done
        log.info("%s: begins", name)
        result = work()
        durable.write_json(path, {**result, _DIGEST: _digest(result)})
        return _result(path)


def row_files(root: Path) -> tuple[Path, Path]:
    """The rows of a job: to train on, and held out."""
    return root / "data" / "train.jsonl", root / "data" / "heldout.jsonl"


def standing(root: Path, results: Iterable[str]) -> list[str]:
    """What there is where a job in `root` would write: files, links, folders that hold something.

    `results` are the names of what it writes in the end.
    """
    own = (*results, "stages", "data/docstrings")
    paths = [*row_files(root), *(root / name for name in own), *_cycles(root)]
    return [str(path) for path in paths if _stands(path)]


def _cycles(root: Path) -> list[Path]:
    return [*root.glob("cycle-*"), *root.glob("baseline-*")]


def _stands(path: Path) -> bool:
    """Whether there is a file or a link, or a folder with more than a killed writer leaves."""
    if not path.is_dir():
        return os.path.lexists(path)
    return any(not p.name.startswith(durable.TEMPORARY_PREFIX) for p in path.iterdir())


def make_directory(directory: Path) -> None:
    """Make a folder and those above it. Raises `ConfigError`."""
    try:
        names.mkdir(directory, parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"The directory {directory} cannot be made ({error.strerror}). Choose another with "
            "--output-dir."
        ) from None


def check_job(
    directory: Path,
    settings: dict[str, Any],
    *,
    resume: bool,
    renamed: Mapping[str, str] | None = None,
    upgraded: Upgrade | None = None,
) -> None:
    """Refuse a job that `directory` holds already, unless it is this one and goes on. Only reads.

    One that has done nothing yet, as where its rows could not be read, is begun anew. Raises
    `ConfigError`.
    """
    job = directory / JOB
    if not _has_done(directory):
        return
    if not resume:
        raise ConfigError(
            f"{directory} holds a job already. Go on with it with --resume, or choose another "
            "--output-dir."
        )
    before = with_present_names(_settings(job), renamed or {})
    _refuse_other(job, settings, before if upgraded is None else upgraded(before))


def _has_done(directory: Path) -> bool:
    """Whether there is a job that has done a stage, or began one that takes long."""
    done = any((directory / "stages").glob("*.json")) or any(map(_stands, _cycles(directory)))
    return (directory / JOB).exists() and done


def _refuse_other(job: Path, settings: dict[str, Any], before: dict[str, Any]) -> None:
    asked = json.loads(json.dumps(settings))
    other = [key for key in sorted({*before, *asked}) if before.get(key) != asked.get(key)]
    if other:
        told = "; ".join(
            f"{key} was {before.get(key)!r} and is {asked.get(key)!r}" for key in other[:4]
        )
        raise ConfigError(
            f"{job.parent} was begun with other settings: {told}. Give the same ones to go on, or "
            "choose another --output-dir."
        )


def _settings(job: Path) -> dict[str, Any]:
    try:
        return read_json_object(job)
    except CheckpointError as error:
        raise CheckpointError(
            f"{error} It says what the job was begun with, so the job cannot go on without it. "
            "Restore it from a copy, or choose another --output-dir."
        ) from error


def _result(path: Path) -> dict[str, Any]:
    """What a stage wrote, which is as it was written. Raises `CheckpointError`."""
    result = read_json_object(path, limit=_LONGEST)
    if result.pop(_DIGEST, None) != _digest(result):
        raise CheckpointError(f"{path} is not as a stage wrote it: its {_DIGEST} is another.")
    return result


def _digest(result: dict[str, Any]) -> str:
    """SHA-256 of a result as it reads back.

    Numbers that are keys are texts then, and half a surrogate pair is the letters of its escape.
    """
    text = json.dumps(json.loads(json.dumps(result)), sort_keys=True).replace("\\", "")
    return hashlib.sha256(text.encode()).hexdigest()
