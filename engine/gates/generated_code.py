"""Run a generated program with limits and without network."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from engine.errors import ConfigError
from engine.storage import strict_json

_WORKER = Path(__file__).with_name("code_worker.py")
_STARTING = 10.0
"""Seconds that the interpreter itself may take, beside the program's own time."""


@dataclass(frozen=True)
class CodeLimits:
    """What one program may use: seconds of processor and of clock, bytes of memory."""

    cpu_seconds: int = 5
    wall_seconds: float = 10.0
    memory_bytes: int = 512 << 20


def run_program(program: str, limits: CodeLimits) -> str | None:
    """Run Python source as a main module; None where it ends well, else why it did not.

    It has no network, writes only into a folder that is removed afterwards, and sees no other
    process (`engine.gates.code_worker`).

    Raises `ConfigError` where this system cannot shut a program off like that: nothing is run then.
    """
    with tempfile.TemporaryDirectory(prefix="engine-code-") as folder:
        request = {"program": program, "folder": folder, **vars(limits)}
        try:
            done = subprocess.run(
                [sys.executable, "-I", str(_WORKER)],
                input=json.dumps(request),
                capture_output=True,
                text=True,
                timeout=limits.wall_seconds + _STARTING,
                env={"HOME": folder, "TMPDIR": folder, "PATH": "/usr/bin:/bin"},
                cwd=folder,
                start_new_session=True,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return f"no end in {limits.wall_seconds} s"
    try:
        result = strict_json.loads(done.stdout)
    except strict_json.JSONFault:
        result = {"outcome": "no isolation", "message": done.stderr.strip()[-300:]}
    if result["outcome"] == "no isolation":
        raise ConfigError(
            "Generated programs cannot be shut off from network and files here, so none was run: "
            f"{result['message']}. This needs Linux 5.13 or newer with user namespaces and "
            "Landlock (a container may forbid them). Leave out `pass_at` and `tests`, or evaluate "
            "on such a machine."
        )
    return None if result["outcome"] == "passed" else str(result["message"])
