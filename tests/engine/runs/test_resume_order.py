"""In which order a checkpoint reaches the disk: what a power cut, unlike a kill, would find out.

Each fsync and rename of a save is noted with the version (inode, time, size) of what it touched.
Faults are planted to show that the check would notice them.
"""

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.runs import checkpoints as resume
from engine.runs.checkpoints import CheckpointStore
from engine.storage import durable
from engine.storage.manifest import MANIFEST_NAME, write_manifest


def save(store: CheckpointStore, step: int) -> None:
    def touch(folder: Path) -> None:
        (folder / "adapter" / "adapter_config.json").write_text("{}")

    tensors = {"adapter/adapter_model": {"a": torch.ones(4)}, "optimizer": {"b": torch.ones(9)}}
    store.save(step, tensors, {"step": step}, touch)


class Recorder(logging.Handler):
    """Notes fsyncs, renames and acknowledgements, with what they applied to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.events: list[tuple[str, Any]] = []
        for name in ("rename", "replace"):
            monkeypatch.setattr(os, name, self._renaming(getattr(os, name)))
        monkeypatch.setattr(os, "fsync", self._syncing(os.fsync))

    def _syncing(self, real: Callable[[int], None]) -> Callable[[int], None]:
        def fsync(descriptor: int) -> None:
            real(descriptor)
            self.events.append(("fsync", version(os.fstat(descriptor))))

        return fsync

    def _renaming(self, real: Callable[[Any, Any], None]) -> Callable[[Any, Any], None]:
        def rename(source: Any, target: Any) -> None:
            under = [Path(source), *Path(source).rglob("*")]
            content = {str(path): version(path.stat()) for path in under}
            self.events.append(("rename", (Path(target), content)))
            real(source, target)

        return rename

    def emit(self, record: logging.LogRecord) -> None:
        if "saved" in record.getMessage():
            self.events.append(("acknowledge", None))


def version(expected: os.stat_result) -> tuple[int, int, int]:
    return expected.st_ino, expected.st_mtime_ns, expected.st_size


def violations(events: list[tuple[str, Any]], root: Path) -> set[str]:
    """What in the order of `events` a power cut could turn into a lost or broken checkpoint."""
    wrong: set[str] = set()
    synced: set[tuple[int, int, int]] = set()
    parent = root.stat().st_ino
    published, parent_synced, acknowledged = False, False, False
    for kind, what in events:
        if kind == "fsync":
            synced.add(what)
            parent_synced = parent_synced or (published and what[0] == parent)
        elif kind == "acknowledge":
            acknowledged = True
            if not (published and parent_synced):
                wrong.add("acknowledged before the folder above was synced")
        elif what[0].name.startswith(".del-"):
            if not acknowledged:
                wrong.add("an old checkpoint retired before the new one was acknowledged")
        else:
            if set(what[1].values()) - synced:
                wrong.add("renamed before what is under it was synced")
            if what[0].parent == root:
                published = True
                manifest = [v for k, v in what[1].items() if k.endswith(MANIFEST_NAME)]
                files = [v for k, v in what[1].items() if Path(k).suffix]
                if not manifest or manifest[0][1] < max(expected[1] for expected in files):
                    wrong.add("the manifest was not written last")
    return wrong if acknowledged else wrong | {"never acknowledged"}


def plant_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    pass


def plant_no_sync_of_the_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(durable, "fsync_tree", lambda root: None)


def plant_no_sync_of_the_folder_above(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(durable, "fsync_dir", lambda path: None)


def plant_early_manifest(monkeypatch: pytest.MonkeyPatch) -> None:
    files = resume._write_files

    def manifest_first(folder: Path, *rest: Any) -> None:
        write_manifest(folder, 3)
        # The clock of a file system may be too coarse to tell two writes apart.
        os.utime(folder / MANIFEST_NAME, ns=(0, 0))
        files(folder, *rest)

    monkeypatch.setattr(resume, "_write_files", manifest_first)
    monkeypatch.setattr(resume, "write_manifest", lambda *_: None)
    monkeypatch.setattr(resume, "read_manifest", lambda *_: {})


def plant_early_retirement(monkeypatch: pytest.MonkeyPatch) -> None:
    real = CheckpointStore._publish

    def retire_first(self: CheckpointStore, *rest: Any) -> None:
        for step in self.steps()[:-1]:
            self._delete(self.path_of(step))
        real(self, *rest)

    monkeypatch.setattr(CheckpointStore, "_publish", retire_first)


@pytest.mark.parametrize(
    ("plant", "expected"),
    [
        (plant_nothing, set()),
        (plant_no_sync_of_the_folder, {"renamed before what is under it was synced"}),
        (
            plant_no_sync_of_the_folder_above,
            {
                "acknowledged before the folder above was synced",
                "renamed before what is under it was synced",
            },
        ),
        (plant_early_manifest, {"the manifest was not written last"}),
        (
            plant_early_retirement,
            {"an old checkpoint retired before the new one was acknowledged"},
        ),
    ],
)
def test_each_line_of_the_protocol_is_durable_before_the_next(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    plant: Callable[[pytest.MonkeyPatch], None],
    expected: set[str],
) -> None:
    store = CheckpointStore(tmp_path)
    save(store, 1)
    save(store, 2)
    caplog.set_level(logging.INFO, "engine.runs.checkpoints")
    recorder = Recorder(monkeypatch)
    plant(monkeypatch)
    logger = logging.getLogger("engine.runs.checkpoints")
    logger.addHandler(recorder)
    try:
        save(store, 3)
    finally:
        logger.removeHandler(recorder)
    store.close()
    assert violations(recorder.events, store.root) == expected
