"""Kill a verb, or fail it, at each of its file operations.

A server that has torch and the verbs loaded forks one child per trial, which runs the command as
the command line does. Audit hooks of the interpreter, and a counting `os.fsync`, tell each opening
for writing, rename, removal, new folder and flush below the trial's folder before it is done: there
the child is killed, or the operation fails with an error of the system. Then the same command runs
undisturbed and has to end with the files of a trial in which nothing happened.
"""

from __future__ import annotations

import errno
import importlib
import json
import os
import re
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from bench.torture.crashes.every_verb import Command, commands, write_inputs
from cli.main import VERBS
from cli.main import main as engine_command
from tests.support.processes.forked import forked, status_of

TEMPORARY = re.compile(r"^\.(tmp|del|bad|replaced)-")
"""Names that say themselves that nobody is to take what they hold for whole."""
TIMED = b'"wall_seconds"'
"""What tells how long it took may repeat by chance."""
LIBRARIES = ("gguf", "matplotlib.figure", "pyarrow.parquet", "tokenizers", "jinja2")
ERRORS = (errno.ENOSPC, errno.EIO)
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_PATHS = {"os.mkdir": (0, 2), "os.rename": (0, 2), "os.remove": (0, 1), "os.rmdir": (0, 1),
          "os.truncate": (0, None), "os.symlink": (1, 2), "os.link": (1, 3)}  # fmt: skip


@dataclass
class Operations:
    """Counts a process's file operations below `root`; the one with number `at` is its last, or
    fails with `error`."""

    root: str
    at: int = 0
    error: int | None = None
    names: list[str] = field(default_factory=list)
    _process: int = 0

    def watch(self) -> None:
        """Begin, in this process and until it ends."""
        self._process = os.getpid()
        sys.addaudithook(self._audited)

        def flush(fd: Any) -> None:
            # Of a killed process what was written survives without a flush: none is done here.
            self._happens("fsync", os.path.realpath(f"/proc/self/fd/{fd}"))

        os.fsync = flush

    def _audited(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, mode, flags = arguments
            writes = flags & _WRITES if isinstance(flags, int) else set(mode or "") & set("wax+")
            if writes and isinstance(path, str | bytes | os.PathLike):
                self._happens("open", self._absolute(path, None))
        elif event in _PATHS:
            where, folder = _PATHS[event]
            base = arguments[folder] if folder is not None else None
            self._happens(event[3:], self._absolute(arguments[where], base))

    def _absolute(self, path: Any, folder: int | None) -> str:
        text = os.fsdecode(path) if not isinstance(path, int) else f"/proc/self/fd/{path}"
        if folder is not None and folder >= 0:
            text = os.path.join(os.path.realpath(f"/proc/self/fd/{folder}"), text)  # noqa: PTH118
        return os.path.abspath(text)  # noqa: PTH100 - a link is not to be followed

    def _happens(self, what: str, path: str) -> None:
        if os.getpid() != self._process or not f"{path}/".startswith(f"{self.root}/"):
            return
        self.names.append(f"{what} {path[len(self.root) + 1 :]}")
        if len(self.names) != self.at:
            return
        if self.error is None:
            os.kill(self._process, signal.SIGKILL)
        raise OSError(self.error or 0, os.strerror(self.error or 0), path)


@dataclass(frozen=True)
class Ending:
    """How a command ended: its status, its operations in order, and what it said."""

    status: int
    operations: list[str]
    said: str


def run(command: Command, folder: Path, at: int = 0, error: int | None = None) -> Ending:
    """Run a command in a child, its output below `folder`, with a fault at operation `at`."""
    operations = Operations(str(folder), at, error)
    log, listed = folder.with_name("said"), folder.with_name("operations")

    def work() -> int:
        try:
            out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            for stream in (1, 2):
                os.dup2(out, stream)
            os.chdir(folder)
            os.environ["ENGINE_CACHE"] = str(folder / "cache")
            operations.watch()
            status = engine_command(command.words(folder))
            sys.stdout.flush()
            sys.stderr.flush()
            return status
        finally:
            listed.write_text("\n".join(operations.names))

    status = status_of(forked(work))
    names = listed.read_text().splitlines() if status != -signal.SIGKILL else []
    return Ending(status, names, log.read_text(errors="replace"))


def contents(folder: Path) -> dict[str, bytes]:
    """Name -> bytes of each file below a folder; a folder's name ends with a slash."""
    return {
        str(path.relative_to(folder)) + "/" * path.is_dir(): b""
        if path.is_dir()
        else path.read_bytes()
        for path in sorted(folder.rglob("*"))
    }


@dataclass
class Expected:
    """What an undisturbed command leaves: the names of all, the bytes of those that repeat."""

    names: set[str]
    repeated: dict[str, bytes]
    operations: list[str]

    def torn(self, seen: dict[str, bytes], growing: tuple[str, ...] = ()) -> list[str]:
        """Files under their final names that hold anything but all of it."""
        wrong = []
        for name, data in seen.items():
            if name.endswith(growing) or any(TEMPORARY.match(part) for part in name.split("/")):
                continue
            if name in self.repeated and data != self.repeated[name]:
                wrong.append(name)
            elif name.endswith(".json") and name not in self.repeated:
                try:
                    json.loads(data)
                except ValueError:
                    wrong.append(name)
        return wrong


@contextmanager
def fresh(folder: Path) -> Iterator[Path]:
    """An empty folder, whatever was there."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def undisturbed(command: Command, folder: Path) -> Expected:
    """Run the command twice: what both leave is what is expected."""
    seen = []
    for _ in range(2):
        time.sleep(1.0 - time.time() % 1.0)  # names and dates of this second are not expected
        with fresh(folder) as trial:
            command.prepare(trial)
            ending = run(command, trial)
            if ending.status:
                raise SystemExit(f"{command.name} does not run: {ending.said}")
            seen.append(contents(trial))
    first, second = seen
    same = {
        name: data for name, data in first.items() if second.get(name) == data and TIMED not in data
    }
    return Expected({name for name in first if name in second}, same, ending.operations)


def complaints(
    command: Command, expected: Expected, folder: Path, at: int, error: int | None
) -> list[str]:
    """What is wrong after a fault at operation `at` and a second, undisturbed, start."""
    with fresh(folder) as trial:
        command.prepare(trial)
        ending = run(command, trial, at, error)
        left = contents(trial)
        wrong = [f"torn: {name}" for name in expected.torn(left, command.growing)]
        if error is not None:
            wrong += spoken(ending)
        whole = expected.names <= left.keys()
        again = run(command, trial)
        if again.status and not (whole and again.status == 2):
            wrong.append(f"does not start again ({again.status}): {again.said[-300:]}")
        return wrong + unlike(expected, contents(trial))


def unlike(expected: Expected, after: dict[str, bytes]) -> list[str]:
    """What a second start left otherwise than an undisturbed one does."""
    return [
        *(f"left: {name}" for name in sorted(after.keys() - expected.names)),
        *(f"missing: {name}" for name in sorted(expected.names - after.keys())),
        *(f"differs: {name}" for name in expected.torn(after)),
    ]


def spoken(ending: Ending) -> list[str]:
    """What is wrong with how a command that met an error of the system ended."""
    if ending.status not in (0, 2):
        return [f"status {ending.status}: {ending.said[-300:]}"]
    if "Traceback" in ending.said:
        return ["a traceback"]
    return []


def campaign(
    command: Command, folder: Path, every: int = 1, errors: tuple[int | None, ...] = (None, *ERRORS)
) -> dict[str, Any]:
    """Faults at each `every`-th operation of a command: how many, and the complaints."""
    expected = undisturbed(command, folder)
    counts: Counter[str] = Counter()
    wrong: list[str] = []
    for at in range(1, len(expected.operations) + 1):
        for number, error in enumerate(errors):
            if (at + number) % every:
                continue
            kind = "killed" if error is None else errno.errorcode[error]
            counts[kind] += 1
            told = complaints(command, expected, folder, at, error)
            counts["bad"] += bool(told)
            operation = expected.operations[at - 1]
            wrong += [f"{command.name} {at} ({operation}) {kind}: {text}" for text in told]
    return {"operations": len(expected.operations), **counts, "wrong": wrong}


def load_verbs() -> None:
    """Import all that commands need, once, and not again in each child."""
    for module in (*(module for module, _ in VERBS.values()), *LIBRARIES):
        importlib.import_module(module)


def main(folder: Path, every: int, kinds: str, names: list[str]) -> None:
    """Print a JSON object: the figures of each command that is named, or of all of them."""
    errors = {"kills": (None,), "errors": ERRORS, "all": (None, *ERRORS)}[kinds]
    torch.set_num_threads(1)
    inputs = write_inputs(folder / "inputs")
    load_verbs()
    figures = {
        command.name: campaign(command, folder / "trial" / "here", every, errors)
        for command in commands(inputs)
        if command.name in names or not names
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4:])
