"""Let one side of a comparison work in a fresh process."""

import json
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


def result_of(
    side: str,
    command: Sequence[str],
    work: Mapping[str, Any],
    folder: Path,
    cwd: Path = ROOT,
    environment: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """What `command WORK RESULT` wrote to the file RESULT about the work in the file WORK.

    Empty where it wrote nothing. A command that fails ends the program with what it said.
    """
    work_file, result_file = folder / "work.json", folder / "result.json"
    work_file.write_text(json.dumps(work))
    result_file.unlink(missing_ok=True)
    done = subprocess.run(
        [*command, str(work_file), str(result_file)],
        cwd=cwd,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise SystemExit(f"{side} failed with status {done.returncode}:\n{done.stdout[-4000:]}")
    result: dict[str, Any] = json.loads(result_file.read_text()) if result_file.exists() else {}
    return result
