"""Every command with what users do wrong, or systems refuse.

`python -m bench.torture.crashes.refused FOLDER [COMMAND ...]` prints one JSON object. Each command
meets an input that is missing, one that is an empty folder, an output it may not write, a disk that
is full, a standard output that is closed, and Ctrl-C. It must end with a documented status and one
paragraph, and never with a traceback. Needs root or a mount namespace of its own, for a small disk.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from bench.torture.crashes.every_verb import Command, commands, write_inputs
from bench.torture.crashes.file_faults import LIBRARIES
from cli.main import VERBS
from cli.main import main as engine_command
from tests.support.processes.forked import forked, status_of

COMMANDS = ("train", "eval --gates", "generate --output", "merge", "quantize", "prune", "plan",
            "export gguf", "init", "data convert", "data split", "compare --plot")  # fmt: skip
DISK = "64k"
_CAPABILITIES = 0x20080522  # version 3 of the interface
Words = list[str]


@dataclass(frozen=True)
class Refusal:
    """How a trial differs from a plain one, and the statuses it may end with."""

    change: Callable[[Words, Path], Words]
    statuses: tuple[int, ...]
    inside: Callable[[Path], None] = lambda folder: None
    disk: bool = False


def _other_input(words: Words, folder: Path, other: Path) -> Words:
    """The first input that is named by a path is another one."""
    at = next(n for n, word in enumerate(words) if word.startswith(str(folder.parent / "inputs")))
    return [*words[:at], str(other), *words[at + 1 :]]


def _missing(words: Words, folder: Path) -> Words:
    return _other_input(words, folder, folder / "no-such-input")


def _empty(words: Words, folder: Path) -> Words:
    (folder / "empty").mkdir()
    return _other_input(words, folder, folder / "empty")


def _same(words: Words, folder: Path) -> Words:
    return words


def _bound_by_permissions(folder: Path) -> None:
    """Give up root's rights over permissions (CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH)."""
    libc = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(_CAPABILITIES, 0)
    rights = (ctypes.c_uint32 * 6)()
    if libc.capget(header, rights):
        raise OSError(ctypes.get_errno(), "capget")
    for kind in range(3):  # effective, permitted, inheritable
        rights[kind] &= ~0b110
    if libc.capset(header, rights):
        raise OSError(ctypes.get_errno(), "capset")


def _read_only(words: Words, folder: Path) -> Words:
    folder.chmod(0o555)
    return words


def _without_output(folder: Path) -> None:
    os.close(1)


REFUSALS = {
    "missing": Refusal(_missing, (2,)),
    "empty folder": Refusal(_empty, (2,)),
    "not permitted": Refusal(_read_only, (0, 2), _bound_by_permissions),
    "full disk": Refusal(_same, (0, 2), disk=True),
    "closed output": Refusal(_same, (0,), _without_output),
    "Ctrl-C": Refusal(_same, (0, 130)),
}


def trial(
    command: Command, name: str, folder: Path, chance: random.Random
) -> tuple[int, list[str]]:
    """The status of a command that met a refusal, and what is wrong with how it ended."""
    refusal = REFUSALS[name]
    folder.chmod(0o755) if folder.exists() else folder.mkdir(parents=True)
    if refusal.disk:
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK}", "tmpfs", folder], check=True)
        (folder / "filler").write_bytes(b"\0" * (56 << 10))
    said = folder.with_name("said")
    try:
        words = refusal.change(command.words(folder), folder)
        after = chance.uniform(0, 1) if name == "Ctrl-C" else None
        status = run(words, folder, said, refusal, after)
    finally:
        if refusal.disk:
            subprocess.run(["umount", folder], check=True)
        shutil.rmtree(folder)
    text = said.read_text(errors="replace")
    wrong = []
    if status not in refusal.statuses:
        wrong.append(f"status {status}: {text[-300:]}")
    if "Traceback" in text or "The program failed" in text:
        wrong.append(f"a traceback: {text[-300:]}")
    complaint = text[text.rfind("engine: ") :].strip() if status else ""
    if status and (not complaint or "\n\n" in complaint):
        wrong.append(f"no paragraph: {text[-300:]}")
    return status, wrong


def run(words: Words, folder: Path, said: Path, refusal: Refusal, after: float | None) -> int:
    """The exit status of a command in a child, with Ctrl-C some seconds after its start."""

    def work() -> int:
        out = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        for stream in (1, 2):
            os.dup2(out, stream)
        os.environ["ENGINE_CACHE"] = str(folder / "cache")
        os.chdir(folder)
        refusal.inside(folder)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        sys.argv = ["engine", *words]
        status = engine_command()
        sys.stderr.flush()
        return status

    child = forked(work)
    if after is not None:
        time.sleep(after)
        os.kill(child, signal.SIGINT)
    return status_of(child)


def main(folder: Path, names: tuple[str, ...]) -> None:
    """Try every cell of the table, and print the figures."""
    torch.set_num_threads(1)
    folder.chmod(0o755)
    inputs = write_inputs(folder / "inputs")
    for module in (*(module for module, _ in VERBS.values()), *LIBRARIES):
        importlib.import_module(module)
    chance, counts, wrong = random.Random(0), Counter[str](), list[str]()
    statuses = {name: Counter[str]() for name in REFUSALS}
    for command in commands(inputs):
        if command.name not in names:
            continue
        for name in REFUSALS:
            status, told = trial(command, name, folder / "trial", chance)
            statuses[name][str(status)] += 1
            counts["good"] += not told
            counts["trials"] += 1
            wrong += [f"{command.name}, {name}: {text}" for text in told]
    figures = {"trials": counts["trials"], "good": counts["good"], "statuses": statuses}
    print(json.dumps(figures | {"wrong": wrong}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), tuple(sys.argv[2:]) or COMMANDS)
