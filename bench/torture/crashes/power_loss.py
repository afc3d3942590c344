"""States of the disk after a loss of power while saving checkpoints.

`python -m bench.torture.crashes.power_loss FOLDER MOST [FAULT]` prints one JSON object. Saving is
recorded as operations on names and files. At each moment what was flushed is on the disk; of the
names that were made, moved and removed since their folder was flushed any part may be, and a file
that was not flushed may be whole, half there or empty. Each such state is made of real files: the
newest checkpoint must load, be as new as the last acknowledged one, and hold its step's content.
FAULT takes flushes away, to show that this would be noticed: `folders` or `files`.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import shutil
import stat
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from engine.runs.checkpoints import CheckpointStore
from tests.support.processes.resume_crash_server import check, tensors_at

STEPS = 4
_MOST_PENDING = 6
"""Pending names of which every part is tried; of more, as many parts are drawn."""

_SHARES = (1.0, 0.5, 0.0)
_EVENTS = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir")
_ROOT = 0
Names = dict[tuple[int, str], int]
State = tuple[int, Names, frozenset[int]]


@dataclass(frozen=True)
class Operation:
    """`make` and `remove` a name of a folder, `move` it to another name, or `flush` a file."""

    kind: str
    folder: int
    name: str = ""
    item: int = -1
    to: str = ""


@dataclass
class Recorder:
    """What the process does below `root`; files and folders have numbers, `root` has 0."""

    root: Path
    operations: list[Operation] = field(default_factory=list)
    acknowledged: list[tuple[int, int]] = field(default_factory=list)
    contents: dict[int, bytes] = field(default_factory=dict)
    folders: set[int] = field(default_factory=lambda: {_ROOT})
    watching: bool = True
    _names: Names = field(default_factory=dict)

    def watch(self, fault: str) -> None:
        """Begin, in this process and until `watching` is false."""
        sys.addaudithook(self._audited)
        fsync = os.fsync

        def flush(fd: Any) -> None:
            fsync(fd)
            kind = "folders" if stat.S_ISDIR(os.fstat(fd).st_mode) else "files"
            path = Path(f"/proc/self/fd/{fd}").readlink()
            if self.watching and path.is_relative_to(self.root):
                item = self._item(path)
                if kind == "files":
                    self.contents[item] = path.read_bytes()
                if kind != fault:
                    self.operations.append(Operation("flush", item))

        os.fsync = flush

    def told(self, step: int) -> None:
        """The step is acknowledged now."""
        self.acknowledged.append((len(self.operations), step))

    def _audited(self, event: str, arguments: tuple[Any, ...]) -> None:
        # An audit comes before what it tells of.
        if not self.watching or event not in _EVENTS:
            return
        if event == "open":
            if isinstance(arguments[0], int):
                return
            path = Path(os.path.abspath(os.fsdecode(arguments[0])))  # noqa: PTH100
            creates = isinstance(arguments[2], int) and arguments[2] & os.O_CREAT
            if creates and path.is_relative_to(self.root) and not path.exists():
                self._make(path, b"")
            return
        base = arguments[2] if event in ("os.mkdir", "os.rename") else arguments[1]
        path = self._path(arguments[0], base)
        if not path.is_relative_to(self.root):
            return
        if event == "os.mkdir":
            if not path.exists():
                self.folders.add(self._make(path, None))
        elif event == "os.rename":
            new = self._path(arguments[1], arguments[3])
            folder, item = self._item(path.parent), self._names.pop(self._key(path))
            self._names[folder, new.name] = item
            self.operations.append(Operation("move", folder, path.name, item, new.name))
        else:
            item = self._names.pop(self._key(path))
            self.operations.append(Operation("remove", self._item(path.parent), path.name, item))

    def _make(self, path: Path, content: bytes | None) -> int:
        item = 1 + sum(operation.kind == "make" for operation in self.operations)
        if content is not None:
            self.contents[item] = content
        self._names[self._key(path)] = item
        self.operations.append(Operation("make", self._item(path.parent), path.name, item))
        return item

    def _path(self, path: Any, folder: int) -> Path:
        above = Path(f"/proc/self/fd/{folder}").readlink() if folder >= 0 else Path()
        return Path(os.path.abspath(above / os.fsdecode(path)))  # noqa: PTH100

    def _key(self, path: Path) -> tuple[int, str]:
        return self._item(path.parent), path.name

    def _item(self, path: Path) -> int:
        item = _ROOT
        for part in path.relative_to(self.root).parts:
            item = self._names[item, part]
        return item


def record(folder: Path, fault: str) -> Recorder:
    """Save some checkpoints, of which two stay."""
    folder.mkdir(parents=True)
    recorder = Recorder(folder.resolve())
    recorder.watch(fault)
    with CheckpointStore(recorder.root) as store:
        for step in range(1, STEPS + 1):
            store.save(step, tensors_at(step), {"step": step})
            recorder.told(step)
    recorder.watching = False
    return recorder


def names_left(operations: list[Operation], chosen: frozenset[int]) -> Names:
    """The names after those operations on names that are `chosen`, in their order."""
    names: Names = {}
    for number in sorted(chosen):
        one = operations[number]
        match one.kind:
            case "make":
                names[one.folder, one.name] = one.item
            case "move" if names.get((one.folder, one.name)) == one.item:
                names[one.folder, one.to] = names.pop((one.folder, one.name))
            case "remove" if names.get((one.folder, one.name)) == one.item:
                del names[one.folder, one.name]
    return names


def states(recorder: Recorder, chance: random.Random) -> Iterator[State]:
    """Moment, names on the disk, and numbers of the files that are whole on it."""
    operations = recorder.operations
    for moment in range(len(operations) + 1):
        safe: set[int] = set()
        pending: dict[int, list[int]] = {}
        whole: set[int] = set()
        for number, one in enumerate(operations[:moment]):
            if one.kind == "flush":
                safe.update(pending.pop(one.folder, ()))
                whole.add(one.folder)
            else:
                pending.setdefault(one.folder, []).append(number)
        open_ones = [number for numbers in pending.values() for number in numbers]
        for part in parts(open_ones, chance):
            yield moment, names_left(operations, frozenset(safe | set(part))), frozenset(whole)


def parts(numbers: list[int], chance: random.Random) -> Iterator[tuple[int, ...]]:
    """Every part of a few, some parts of many."""
    if len(numbers) <= _MOST_PENDING:
        for size in range(len(numbers) + 1):
            yield from itertools.combinations(numbers, size)
        return
    yield ()
    yield tuple(numbers)
    for _ in range(2**_MOST_PENDING):
        yield tuple(number for number in numbers if chance.random() < 0.5)


def build(recorder: Recorder, names: Names, contents: dict[int, bytes], folder: Path) -> None:
    """Make the files of a state."""
    shutil.rmtree(folder, ignore_errors=True)
    queue = [(_ROOT, folder)]
    while queue:
        item, path = queue.pop()
        path.mkdir()
        for (above, name), inner in names.items():
            if above != item:
                continue
            if inner in recorder.folders:
                queue.append((inner, path / name))
            else:
                (path / name).write_bytes(contents[inner])


def main(folder: Path, most: int, fault: str = "none") -> None:
    """Try the states, at most so many, and print the figures."""
    torch.set_num_threads(1)
    recorder = record(folder / "run", fault)
    os.fsync = lambda fd: None  # what is tried now need not outlive anything
    chance, counts, seen = random.Random(0), Counter[str](), set[Any]()
    possible: list[tuple[int, Names, dict[int, bytes]]] = []
    for moment, names, whole in states(recorder, chance):
        there = set(names.values()) & recorder.contents.keys()
        for share in _SHARES:
            contents = {
                item: data if item in whole else data[: int(len(data) * share)]
                for item, data in recorder.contents.items()
                if item in there
            }
            acknowledged = max((s for at, s in recorder.acknowledged if at <= moment), default=0)
            key = (acknowledged, frozenset(names.items()), frozenset(contents.items()))
            if key not in seen:
                seen.add(key)
                possible.append((acknowledged, names, contents))
    for acknowledged, names, contents in chance.sample(possible, min(most, len(possible))):
        build(recorder, names, contents, folder / "state")
        counts[check(folder / "state", acknowledged)] += 1
    kinds = {kind: counts[kind] for kind in ("good", "lost", "unloadable", "wrong")}
    figures = {"operations": len(recorder.operations), "states": len(possible)}
    print(json.dumps(figures | {"trials": sum(kinds.values())} | kinds))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:])
