"""Checkpoints: what comes back, and what is set aside or refused.

The order of the writing is in test_resume_order.py, random kills are in test_resume_crash.py.
"""

import errno
import json
import os
import random
import resource
import shutil
from collections import namedtuple
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.errors import CheckpointError, ConfigError
from engine.runs.checkpoints import CheckpointStore
from engine.storage import durable
from engine.storage.manifest import MANIFEST_NAME, read_manifest

Tensors = dict[str, dict[str, torch.Tensor]]


def tensors_at(step: int) -> Tensors:
    return {
        "adapter/adapter_model": {"a.weight": torch.full((4, 8), 1.0 + step)},
        "optimizer": {
            "codes": torch.arange(200, dtype=torch.uint8),
            "absmax": torch.tensor(0.1 * step, dtype=torch.float32),
        },
    }


@pytest.fixture
def store(tmp_path: Path) -> Iterator[CheckpointStore]:
    with CheckpointStore(tmp_path) as opened:
        yield opened


def save(store: CheckpointStore, *steps: int) -> None:
    for step in steps:
        store.save(step, tensors_at(step), {"step": step})


def reopened(store: CheckpointStore) -> CheckpointStore:
    store.close()
    return CheckpointStore(store.root)


def touch(path: Path) -> None:
    path.write_text("{}")


def damage(path: Path, offset: int = -3) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 4
    path.write_bytes(data)


def as_bytes(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()


def names(folder: Path) -> set[str]:
    return {entry.name for entry in folder.iterdir()} - {".lock"}


def test_everything_comes_back_bit_for_bit(store: CheckpointStore) -> None:
    sent: Tensors = {
        "many": {
            "bf16": torch.randn(3, 5).bfloat16(),
            "fp32": torch.tensor([0.1, -0.0, 1e-45]),
            "uint8": torch.arange(256, dtype=torch.uint8),
            "int64": torch.tensor(-(2**62)),
            "turned": torch.randn(4, 6).T,
        }
    }
    state = {"loss": 0.1 + 0.2, "big": 2**80, "text": "ü", "list": [1, None, True]}
    store.save(7, sent, state)
    checkpoint = store.latest()
    assert checkpoint is not None
    assert (checkpoint.step, checkpoint.state) == (7, state)
    got = checkpoint.tensors("many")
    assert got.keys() == sent["many"].keys()
    for name, tensor in sent["many"].items():
        assert got[name].dtype == tensor.dtype
        assert got[name].shape == tensor.shape
        assert as_bytes(got[name]) == as_bytes(tensor)


def test_loaded_tensors_outlive_their_files(store: CheckpointStore) -> None:
    save(store, 1)
    checkpoint = store.latest()
    assert checkpoint is not None
    weight = checkpoint.tensors("adapter/adapter_model")["a.weight"]
    save(store, 2, 3)
    assert not checkpoint.path.exists()
    weight += 1
    assert torch.equal(weight, torch.full((4, 8), 3.0))


def test_the_newest_by_step_stay_and_are_ordered_by_step(store: CheckpointStore) -> None:
    save(store, 8, 9, 10, 100)
    assert store.steps() == [10, 100]
    os.utime(store.path_of(10))
    checkpoint = reopened(store).latest()
    assert checkpoint is not None
    assert checkpoint.step == 100


def test_what_a_killed_process_was_about_to_retire_goes_as_its_run_goes_on(
    store: CheckpointStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where that run had made its last step and saves no other."""
    save(store, 1, 2)
    with monkeypatch.context() as patch:
        patch.setattr(store, "_retire", lambda: None)
        save(store, 3)
    assert names(store.root) == {"checkpoint-1", "checkpoint-2", "checkpoint-3"}
    loaded = reopened(store).resume("auto")
    assert loaded is not None and loaded.step == 3
    assert names(store.root) == {"checkpoint-2", "checkpoint-3"}


def test_the_callers_files_are_part_of_the_checkpoint(store: CheckpointStore) -> None:
    name = "adapter/adapter_config.json"
    path = store.save(1, tensors_at(1), {}, lambda folder: touch(folder / name))
    assert name in store.load(path).files
    damage(path / name, 0)
    with pytest.raises(CheckpointError, match="adapter_config"):
        store.load(path)


def test_a_damaged_newest_is_set_aside_and_the_one_before_it_used(
    store: CheckpointStore, caplog: pytest.LogCaptureFixture
) -> None:
    save(store, 1, 2)
    damage(store.path_of(2) / "optimizer.safetensors")
    store = reopened(store)
    checkpoint = store.latest()
    assert checkpoint is not None
    assert checkpoint.step == 1
    assert "optimizer.safetensors is damaged" in caplog.text
    assert len(list(store.root.glob(".bad-checkpoint-2-*"))) == 1
    save(store, 2)
    assert store.steps() == [1, 2]


def test_starting_over_has_to_be_asked_for_where_no_checkpoint_verifies(
    store: CheckpointStore,
) -> None:
    assert store.resume("auto") is None
    save(store, 1)
    (store.path_of(1) / MANIFEST_NAME).unlink()
    for _ in range(2):
        store = reopened(store)
        with pytest.raises(CheckpointError, match=r"No checkpoint in .* verifies"):
            store.resume("auto")
    store.clear()
    assert store.resume("auto") is None
    assert names(store.root) == set()


def test_a_folder_that_cannot_be_listed_is_named_and_loses_nothing(
    store: CheckpointStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(store, 1, 2)

    def failing(folder: Path) -> list[str]:
        if (store.root / "checkpoint-3").exists():  # so it is the retiring that fails
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(folder))
        return os.listdir(folder)  # noqa: PTH208

    with monkeypatch.context() as patch:
        patch.setattr("engine.storage.names.listed", failing)
        store.save(3, tensors_at(3), {"step": 3})  # old ones are not retired this time
        with pytest.raises(CheckpointError, match=r"Cannot list the folder .* \(EIO\)"):
            store.steps()
    assert names(store.root) >= {"checkpoint-1", "checkpoint-2", "checkpoint-3"}
    save(store, 4)
    assert store.steps() == [3, 4]


def test_leftovers_are_swept_and_nothing_else_is(store: CheckpointStore) -> None:
    save(store, 1, 2)
    store.close()
    for name in (".tmp-checkpoint-3-77-0123abcd", ".del-checkpoint-1-0123abcd"):
        (store.root / name / "sub").mkdir(parents=True)
    (store.root / ".tmp-summary.json-77-0123abcd").write_text("half")
    foreign = {".tmp-notes", "checkpoint-old", ".del-me", "adapter"}
    for name in foreign:
        (store.root / name).mkdir()
    CheckpointStore(store.root)
    assert names(store.root) == {"checkpoint-1", "checkpoint-2"} | foreign


def test_going_on_from_an_earlier_checkpoint_sets_the_later_ones_aside(
    store: CheckpointStore,
) -> None:
    save(store, 1, 2)
    store = reopened(store)
    checkpoint = store.resume(str(store.path_of(1)))
    assert checkpoint is not None
    assert checkpoint.step == 1
    assert store.steps() == [1]
    assert len(list(store.root.glob(".old-checkpoint-2-*"))) == 1
    save(store, 1, 2)
    assert store.steps() == [1, 2]


def test_going_on_from_another_runs_checkpoint_leaves_that_run_alone(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    with CheckpointStore(tmp_path / "a") as first, CheckpointStore(tmp_path / "b") as second:
        save(first, 1, 2)
        checkpoint = second.resume(str(first.path_of(1)))
        assert checkpoint is not None
        save(second, 1, 2)
        assert first.steps() == second.steps() == [1, 2]


def test_a_step_saved_twice_is_written_once_and_anothers_is_not_replaced(
    store: CheckpointStore,
) -> None:
    save(store, 5)
    before = store.path_of(5).stat().st_ino
    save(store, 5)
    assert store.path_of(5).stat().st_ino == before
    with pytest.raises(CheckpointError, match="exists already"):
        save(reopened(store), 5)


def test_one_process_at_a_time(store: CheckpointStore) -> None:
    with pytest.raises(ConfigError, match=f"process {os.getpid()}"):
        CheckpointStore(store.root)
    store.close()
    CheckpointStore(store.root).close()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_value_that_is_not_finite_is_never_saved(store: CheckpointStore, value: float) -> None:
    save(store, 1)
    bad = tensors_at(2)
    bad["optimizer"]["absmax"] = torch.tensor([0.0, value], dtype=torch.bfloat16)
    with pytest.raises(CheckpointError, match=r"optimizer: absmax hold.*not finite"):
        store.save(2, bad, {})
    assert names(store.root) == {"checkpoint-1"}


def test_a_value_that_is_not_finite_is_never_loaded(
    store: CheckpointStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engine.runs.checkpoints.refuse_nonfinite", lambda *_: None)
    store.save(1, {"weights": {"a": torch.ones(2), "b": torch.tensor([1.0, -torch.inf])}}, {})
    checkpoint = store.latest()
    assert checkpoint is not None
    with pytest.raises(CheckpointError, match=r"weights\.safetensors .*not finite in b\."):
        checkpoint.tensors("weights")


def test_a_missing_group_of_tensors_is_named(store: CheckpointStore) -> None:
    save(store, 1)
    checkpoint = store.latest()
    assert checkpoint is not None
    with pytest.raises(CheckpointError, match=r"no weights\.safetensors"):
        checkpoint.tensors("weights")


def test_no_bit_can_flip_unnoticed(store: CheckpointStore) -> None:
    save(store, 1)
    path = store.path_of(1)
    draw = random.Random(0)
    files = [entry for entry in sorted(path.rglob("*")) if entry.is_file()]
    assert len(files) == 4
    for file in files:
        whole = file.read_bytes()
        for _ in range(150):
            index, bit = draw.randrange(len(whole)), 1 << draw.randrange(8)
            file.write_bytes(whole[:index] + bytes([whole[index] ^ bit]) + whole[index + 1 :])
            with pytest.raises(CheckpointError):
                store.load(path)
        file.write_bytes(whole[:-1])
        with pytest.raises(CheckpointError):
            store.load(path)
        file.write_bytes(whole)
    store.load(path)


def test_a_manifest_in_another_steps_folder_is_refused(store: CheckpointStore) -> None:
    save(store, 1)
    shutil.copytree(store.path_of(1), store.path_of(9))
    with pytest.raises(CheckpointError, match="of step 1, in a folder of step 9"):
        store.load(store.path_of(9))


def test_a_manifest_cannot_name_files_outside(store: CheckpointStore) -> None:
    from engine.storage import manifest as module

    save(store, 1)
    path = store.path_of(1) / MANIFEST_NAME
    content = json.loads(path.read_text())
    content["files"]["../x"] = content["files"].pop("state.json")
    content["self_sha256"] = module._own_hash(content)
    path.write_text(module._text(content))
    with pytest.raises(CheckpointError, match=r"\.\./x"):
        store.load(store.path_of(1))


def test_a_file_that_cannot_grow_leaves_the_last_checkpoint_intact(store: CheckpointStore) -> None:
    save(store, 1)
    big = {"optimizer": {"codes": torch.zeros(1 << 20)}}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
    try:
        with pytest.raises(CheckpointError, match=r"checkpoint-2.*File too large"):
            store.save(2, big, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert names(store.root) == {"checkpoint-1"}
    store.load(store.path_of(1))


def test_a_disk_without_room_is_found_before_anything_is_written(
    store: CheckpointStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(1, 1, 3 << 20))
    with pytest.raises(CheckpointError, match=r"has 3\.00 MiB free and a checkpoint needs 64\.0"):
        save(store, 1)
    assert names(store.root) == set()


def failing(real: Callable[[Any], Any], failures: int, here: Callable[[Any], bool]) -> Any:
    """A call of the system that fails with EIO at first, where `here` says so of its argument."""
    left = [failures]

    def call(given: Any) -> Any:
        if left[0] > 0 and here(given):
            left[0] -= 1
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(given)

    return call


@pytest.mark.parametrize(("failures", "saved"), [(1, True), (2, True), (10**6, False)])
def test_an_input_output_error_is_answered_by_writing_anew(
    store: CheckpointStore, monkeypatch: pytest.MonkeyPatch, failures: int, saved: bool
) -> None:
    save(store, 1)
    monkeypatch.setattr(os, "fsync", failing(os.fsync, failures, lambda _: True))
    if saved:
        save(store, 2)
        store.load(store.path_of(2))
    else:
        with pytest.raises(CheckpointError, match=r"EIO.* steps are safe: 1\."):
            save(store, 2)
        assert names(store.root) == {"checkpoint-1"}


@pytest.mark.parametrize(("failures", "saved"), [(1, True), (9, False)])
def test_a_checkpoint_whose_name_is_not_confirmed_is_written_anew(
    store: CheckpointStore, monkeypatch: pytest.MonkeyPatch, failures: int, saved: bool
) -> None:
    def named(folder: Path) -> bool:
        return folder == store.root and store.path_of(2).exists()

    save(store, 1)
    monkeypatch.setattr(durable, "fsync_dir", failing(durable.fsync_dir, failures, named))
    if saved:
        save(store, 2)
    else:
        # The name that the disk did not confirm is not among those that are safe.
        with pytest.raises(CheckpointError, match=r"written whole .* steps are safe: 1\."):
            save(store, 2)
    assert names(store.root) == {"checkpoint-1", "checkpoint-2"}
    store.load(store.path_of(2))


def test_a_folder_that_cannot_be_listed_does_not_hide_what_failed(
    store: CheckpointStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(store, 1)
    monkeypatch.setattr(os, "fsync", failing(os.fsync, 10**6, lambda _: True))
    refused = failing(Path.iterdir, 10**6, lambda folder: folder == store.root)
    monkeypatch.setattr(Path, "iterdir", lambda folder: refused(folder))
    with pytest.raises(CheckpointError, match=r"^Cannot write .*checkpoint-2.*EIO"):
        save(store, 2)


def test_a_whole_checkpoint_reads_back_by_its_manifest_alone(store: CheckpointStore) -> None:
    save(store, 3)
    manifest = read_manifest(store.path_of(3), 3)
    for name, entry in manifest["files"].items():
        assert (store.path_of(3) / name).stat().st_size == entry["bytes"]
