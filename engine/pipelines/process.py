"""Run one stage of a pipeline in a process of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from io import FileIO
from pathlib import Path

import yaml

from engine.pipelines.recipe import Stage
from engine.runs.signals import PASSES_ON, Interrupted, PassedOn
from engine.storage import durable
from engine.storage.safe_files import write_regular

_MOST_MESSAGE = 4000


def _opened(path: Path) -> FileIO:
    with durable.writing(path):
        return write_regular(path)


def run_stage(
    stage: Stage, options: Sequence[str], folder: Path, *, quiet: bool
) -> tuple[int, str | None]:
    """Run a stage, with more options; its exit status, and its last words if it failed.

    `settings.yaml` of the folder holds the stage's settings, the same in each start of it.

    What it prints goes to this program's own output and, of its errors, to `stderr.log` of the
    folder; with `quiet`, standard output goes to `stdout.log` instead. Raises `Interrupted` where a
    signal asked this program to stop and the stage ended well all the same.

    The status is that of a command line: 128 + n where signal n ended the process.
    """
    file = folder / "settings.yaml"
    durable.write_text(
        file, yaml.safe_dump(dict(stage.settings), sort_keys=False, allow_unicode=True)
    )
    command = [sys.executable, "-m", "engine", *stage.verb.split(), "--config", str(file), *options]
    errors, printed = folder / "stderr.log", folder / "stdout.log"
    environment = os.environ | {PASSES_ON: "1"}
    with (
        _opened(errors) as log,
        _opened(printed) as output,
        subprocess.Popen(
            command, stdout=output if quiet else None, stderr=subprocess.PIPE, env=environment
        ) as process,
        PassedOn(process.pid) as signals,
    ):
        assert process.stderr is not None
        for line in process.stderr:
            with durable.writing(errors):
                log.write(line)
            sys.stderr.write(line.decode("utf-8", "replace"))
            sys.stderr.flush()
        status = process.wait()
    if status < 0:  # as a shell tells it
        return 128 - status, f"was ended by signal {-status} ({signal.strsignal(-status)})"
    if status == 0 and signals.number is not None:
        raise Interrupted(signals.number)
    if status == 0:
        return 0, None
    last = errors.read_text(encoding="utf-8", errors="replace").strip()[-_MOST_MESSAGE:]
    return status, last.splitlines()[-1] if last else f"ended with status {status}"
