"""Processes that answer one line with another, and hold nothing worth saving.

Templates and tokenizers of strangers work in such processes, because only the
end of its process stops it in time.
"""

from __future__ import annotations

import contextlib
import subprocess


def ask(process: subprocess.Popen[str], line: str) -> str | None:
    """The line that the process answers to `line`; None where it ended before, or meanwhile."""
    assert process.stdin is not None and process.stdout is not None
    try:
        process.stdin.write(f"{line}\n")
        process.stdin.flush()
        answer = process.stdout.readline()
    except BrokenPipeError:
        return None
    return answer if answer.endswith("\n") else None


def end(process: subprocess.Popen[str]) -> None:
    """Kill the process, close its pipes, and collect it."""
    process.kill()
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            with contextlib.suppress(BrokenPipeError):  # what it never read is of no use
                stream.close()
    process.wait()
