"""Every step of saving a checkpoint is in its place, and taking one away is noticed."""

import os
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

import engine.runs.checkpoints
import engine.storage.manifest
from engine.errors import CheckpointError
from engine.runs.checkpoints import CheckpointStore
from engine.storage import durable

TENSORS = {"adapter/adapter_model": {"a": torch.ones(4, 3)}, "optimizer": {"m": torch.zeros(5)}}
Patch = pytest.MonkeyPatch


class Disk:
    """What would survive a loss of power: the files, folders and names that were flushed."""

    def __init__(self, patch: Patch) -> None:
        self.faults: list[str] = []
        self._flushed: set[str] = set()
        self._names: set[str] = set()  # of folders whose last rename is not flushed yet
        self._safe: set[str] = set()
        fsync, rename, replace, remove = os.fsync, Path.rename, Path.replace, shutil.rmtree

        def flush(descriptor: int) -> None:
            fsync(descriptor)
            path = os.path.realpath(f"/proc/self/fd/{descriptor}")
            self._flushed.add(path)
            named = {name for name in self._names if str(Path(name).parent) == path}
            self._names -= named
            self._safe |= {name for name in named if Path(name).name.startswith("checkpoint-")}

        def moved(old: Path, new: Path, move: Callable[[Path, Path], Path]) -> Path:
            self._before(old, new)
            move(old, new)
            self._flushed |= {
                p.replace(str(old), str(new), 1) for p in self._flushed if p.startswith(str(old))
            }
            self._names.add(str(new))
            return new

        def delete(path: Path, *rest: Any, **named: Any) -> None:
            if path.exists() and not path.name.startswith((".tmp-", ".del-")):
                self.faults.append(f"{path.name} is deleted under its own name")
            if path.name.startswith(".del-") and str(path) in self._names:
                self.faults.append(f"{path.name} is deleted before its new name is flushed")
            remove(path, *rest, **named)

        patch.setattr(os, "fsync", flush)
        patch.setattr(Path, "rename", lambda old, new: moved(old, Path(new), rename))
        patch.setattr(Path, "replace", lambda old, new: moved(old, Path(new), replace))
        patch.setattr(shutil, "rmtree", delete)

    def _before(self, old: Path, new: Path) -> None:
        if new.name.startswith(".del-"):
            self._safe.discard(str(old))
            if len(self._safe) < 2:
                self.faults.append(f"{old.name} is retired while fewer than two others are safe")
        if not new.name.startswith("checkpoint-"):
            return
        for path in (old, *old.rglob("*")):
            if str(path) not in self._flushed:
                self.faults.append(f"{path.relative_to(old.parent)} is published unflushed")

    def acknowledged(self, target: Path) -> None:
        if str(target) not in {p for p in self._flushed if "checkpoint-" in p}:
            self.faults.append(f"{target.name} is acknowledged without having been moved there")
        if str(target) in self._names:
            self.faults.append(f"{target.name} is acknowledged before its name is flushed")


def save_steps(root: Path, patch: Patch) -> list[str]:
    """Save four steps, of which two stay; what was out of order."""
    disk = Disk(patch)
    with CheckpointStore(root) as store:
        for step in range(1, 5):
            store.save(step, TENSORS, {"step": step})
            disk.acknowledged(store.path_of(step))
        return [*disk.faults, *content_faults(store)]


def content_faults(store: CheckpointStore) -> list[str]:
    """Damage to the newest checkpoint that loading does not notice."""
    faults, newest = [], store.path_of(4)
    created = (newest / "MANIFEST.json").read_bytes().index(b'"created": "') + 14
    for name, at in (("optimizer.safetensors", -1), ("state.json", 9), ("MANIFEST.json", created)):
        whole = (newest / name).read_bytes()
        changed = bytearray(whole)
        changed[at] ^= 1
        (newest / name).write_bytes(changed)
        faults += [f"a bit of {name}" for _ in (0,) if loads(store, newest)]
        (newest / name).write_bytes(whole)
    elsewhere = store.root / "checkpoint-9"
    shutil.copytree(newest, elsewhere)
    faults += ["another step's folder" for _ in (0,) if loads(store, elsewhere)]
    try:
        store.save(10, {"a": {"x": torch.tensor([float("nan")])}}, {})
    except CheckpointError:
        return faults
    return [*faults, "a value that is not finite"]


def loads(store: CheckpointStore, path: Path) -> bool:
    try:
        store.load(path)
    except CheckpointError:
        return False
    return True


def test_a_save_flushes_moves_and_retires_in_order(tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        assert save_steps(tmp_path, patch) == []


def drop_flushes(patch: Patch, of_kind: Callable[[int, str], bool]) -> None:
    fsync = os.fsync

    def flush(descriptor: int) -> None:
        path = os.path.realpath(f"/proc/self/fd/{descriptor}")
        if not of_kind(os.fstat(descriptor).st_mode, path):
            fsync(descriptor)

    patch.setattr(os, "fsync", flush)  # over the recorder: what is dropped is not recorded either


@contextmanager
def straight_to_the_target(target: Path) -> Iterator[Path]:
    target.mkdir()
    yield target
    durable.fsync_tree(target)
    durable.fsync_dir(target.parent)


def without_self_hash(patch: Patch) -> None:
    patch.setattr(engine.storage.manifest, "_own_hash", lambda content: "0" * 64)


def ignore_step(patch: Patch) -> None:
    read = engine.storage.manifest.read_manifest
    patch.setattr(engine.runs.checkpoints, "read_manifest", lambda folder, step=None: read(folder))


def delete_under_its_name(patch: Patch) -> None:
    patch.setattr(CheckpointStore, "_delete", lambda self, path: shutil.rmtree(path))


def retire_all(store: CheckpointStore, _tensors: Any) -> None:
    for step in store.steps():
        store._delete(store.path_of(step))


STEPS: dict[str, Callable[[Patch], None]] = {
    "hash of files": lambda p: p.setattr(engine.runs.checkpoints, "verify_files", lambda *_: None),
    "hash of the manifest": without_self_hash,
    "step in the manifest": ignore_step,
    "rename into place": lambda p: p.setattr(durable, "publish_directory", straight_to_the_target),
    "retire by rename": delete_under_its_name,
    "finite values only": lambda p: p.setattr(
        engine.runs.checkpoints, "refuse_nonfinite", lambda *_: None
    ),
    "retire after the next is safe": lambda p: p.setattr(
        CheckpointStore, "_require_space", retire_all
    ),
}
FLUSHES: dict[str, Callable[[int, str], bool]] = {
    "flush of files": lambda mode, _: stat.S_ISREG(mode),
    "flush of the new folder": lambda mode, path: stat.S_ISDIR(mode) and ".tmp-" in path,
    "flush of the folder above": lambda mode, path: stat.S_ISDIR(mode) and ".tmp-" not in path,
}


@pytest.mark.parametrize("step", STEPS)
def test_a_step_of_the_protocol_that_is_missing_is_noticed(step: str, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        STEPS[step](patch)
        assert save_steps(tmp_path, patch)


@pytest.mark.parametrize("step", FLUSHES)
def test_a_flush_that_is_missing_is_noticed(step: str, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        disk = Disk(patch)
        drop_flushes(patch, FLUSHES[step])
        with CheckpointStore(tmp_path) as store:
            for number in range(1, 5):
                store.save(number, TENSORS, {"step": number})
                disk.acknowledged(store.path_of(number))
        assert disk.faults
