import errno
import json
import os
import shutil
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from engine.errors import CheckpointError, ConfigError
from engine.storage import durable


def left_over(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name.startswith(".tmp-"))


def test_written_bytes_replace_the_old_ones(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    durable.write_text(path, "old")
    durable.write_bytes(path, b"new")
    assert path.read_bytes() == b"new"
    assert left_over(tmp_path) == []


def test_json_is_sorted_and_ends_with_a_newline(tmp_path: Path) -> None:
    durable.write_json(tmp_path / "a.json", {"b": 1, "a": ["ü"]})
    text = (tmp_path / "a.json").read_text(encoding="utf-8")
    assert text.endswith("}\n")
    assert text.index('"a"') < text.index('"b"')
    assert json.loads(text) == {"a": ["ü"], "b": 1}


def test_json_refuses_nan_and_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    durable.write_json(path, {"a": 1})
    with pytest.raises(ValueError):
        durable.write_json(path, {"a": float("nan")})
    assert json.loads(path.read_text()) == {"a": 1}


def test_mode_is_what_the_umask_allows(tmp_path: Path) -> None:
    old = os.umask(0o022)
    try:
        durable.write_text(tmp_path / "a", "x")
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o644


def test_an_exception_inside_leaves_the_old_file_and_no_temporary(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_text("old")

    def write_half() -> None:
        with durable.replacing(path) as handle:
            handle.write(b"half")
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        write_half()
    assert path.read_text() == "old"
    assert left_over(tmp_path) == []


def test_file_and_folder_are_synced_around_the_rename(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    fsync, replace = os.fsync, Path.replace

    def record_fsync(descriptor: int) -> None:
        mode = os.fstat(descriptor).st_mode
        events.append("sync folder" if stat.S_ISDIR(mode) else "sync file")
        fsync(descriptor)

    def record_replace(self: Path, target: Path) -> Path:
        events.append("rename")
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(Path, "replace", record_replace)
    durable.write_text(tmp_path / "a", "x")
    assert events == ["sync file", "rename", "sync folder"]
    events.clear()
    with durable.publish_directory(tmp_path / "d") as folder:
        (folder / "one").write_text("1")
    assert events == ["sync file", "sync folder", "rename", "sync folder"]


@pytest.mark.parametrize(
    ("code", "hint"),
    [
        (errno.ENOSPC, "are free there. It was not written, and what stood there stays. Make room"),
        (errno.EDQUOT, "Make room"),
        (errno.EROFS, "that you may write to"),
        (errno.EACCES, "that you may write to"),
        (errno.EIO, "was not written"),
    ],
)
def test_a_refusing_disk_is_named_with_the_systems_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, hint: str
) -> None:
    path = tmp_path / "a"
    path.write_text("old")

    def refuse(descriptor: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(CheckpointError) as caught:
        durable.write_text(path, "new")
    message = str(caught.value)
    assert str(path) in message
    assert os.strerror(code) in message
    assert errno.errorcode[code] in message
    assert hint in message
    assert path.read_text() == "old"
    assert left_over(tmp_path) == []


def _write_file(target: Path) -> None:
    durable.write_text(target, "new")


def _write_folder(target: Path) -> None:
    with durable.publish_directory(target) as folder:
        (folder / "one").write_text("new")


def _write_files(target: Path) -> None:
    with durable.publish_files(target) as folder:
        (folder / target.name).write_text("new")


@pytest.mark.parametrize("write", [_write_file, _write_folder, _write_files])
def test_an_output_is_said_to_be_whole_where_only_its_name_is_not_confirmed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Callable[[Path], None]
) -> None:
    real = durable.fsync_dir

    def refuse(folder: Path | str) -> None:
        if Path(folder) == tmp_path:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        real(folder)

    monkeypatch.setattr(durable, "fsync_dir", refuse)
    with pytest.raises(durable.UnconfirmedError) as caught:
        write(tmp_path / "a")
    assert f"{tmp_path / 'a'} is written whole and can be used" in str(caught.value)
    assert f"flushing the folder {tmp_path} failed" in str(caught.value)
    assert (tmp_path / "a").exists() and left_over(tmp_path) == []


def test_a_full_disk_says_what_is_needed_and_the_final_name(tmp_path: Path) -> None:
    folder = durable.temporary_beside(tmp_path / "out")
    error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    told = str(durable.write_error(durable.temporary_beside(folder / "a.json"), error, 3000))
    assert f"Cannot write {tmp_path / 'out' / 'a.json'}: No space left" in told
    assert "It takes 2.93 KiB, and" in told and "are free there" in told
    with (
        pytest.raises(
            CheckpointError, match=f"Cannot write {tmp_path / 'b.json'}: Not a directory"
        ),
        durable.publish_files(tmp_path / "a.json") as files,
    ):
        raise durable.write_error(files / "b.json", NotADirectoryError(20, "Not a directory"))


def test_a_file_size_limit_stops_a_write_cleanly(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource", reason="file size limits exist on POSIX only")
    signal = pytest.importorskip("signal")
    path = tmp_path / "a"
    path.write_text("old")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (65_536, limits[1]))
        with pytest.raises(CheckpointError, match="EFBIG"):
            durable.write_bytes(path, bytes(1_000_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert path.read_text() == "old"
    assert left_over(tmp_path) == []


@pytest.mark.parametrize("where", ["missing/a", "file/a"])
def test_a_folder_that_is_none_is_named(tmp_path: Path, where: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="has to exist"):
        durable.write_text(tmp_path / where, "x")


def test_a_folder_under_a_file_cannot_be_published(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(CheckpointError, match="Cannot write"),
        durable.publish_directory(tmp_path / "file" / "out"),
    ):
        pytest.fail("the body must not run")


def test_a_directory_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "out"
    with durable.publish_directory(target) as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "a").write_text("x")
        assert not target.exists()
    assert (target / "sub" / "a").read_text() == "x"


def test_a_directory_that_fails_half_way_leaves_nothing(tmp_path: Path) -> None:
    def write_half() -> None:
        with durable.publish_directory(tmp_path / "out") as folder:
            (folder / "a").write_text("x")
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        write_half()
    assert list(tmp_path.iterdir()) == []


def test_files_appear_together_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "a"

    def write_two(error: Exception | None) -> None:
        with durable.publish_files(target) as folder:
            (folder / "a-1").write_text("x")
            (folder / "a-2").write_text("y")
            if error is not None:
                raise error

    with pytest.raises(RuntimeError, match="stop"):
        write_two(RuntimeError("stop"))
    with pytest.raises(CheckpointError, match="ENOSPC"):
        write_two(OSError(errno.ENOSPC, "full"))
    assert list(target.parent.iterdir()) == []
    write_two(None)
    assert {path.name: path.read_text() for path in target.parent.iterdir()} == {
        "a-1": "x",
        "a-2": "y",
    }


def test_files_under_a_file_cannot_be_published(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(CheckpointError, match="Cannot write"),
        durable.publish_files(tmp_path / "file" / "out"),
    ):
        pytest.fail("the body must not run")


def test_an_occupied_output_is_refused_and_kept(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("x")
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name in ("out", "file", "link"):
        with (
            pytest.raises(ConfigError, match="exists already"),
            durable.publish_directory(tmp_path / name),
        ):
            pytest.fail("the body must not run")
    assert (tmp_path / "out" / "mine").read_text() == "x"


def test_an_empty_folder_may_be_the_output(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with durable.publish_directory(tmp_path / "out") as folder:
        (folder / "a").write_text("x")
    assert (tmp_path / "out" / "a").exists()


def test_sha256_is_that_of_the_bytes(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    assert durable.sha256_file(tmp_path / "a").startswith("ba7816bf8f01cfea414140de5dae2223")
    with pytest.raises(CheckpointError, match="ENOENT"):
        durable.sha256_file(tmp_path / "b")


def test_too_little_space_is_found_before_writing(tmp_path: Path) -> None:
    durable.require_space(tmp_path / "new" / "out", 1)
    with pytest.raises(CheckpointError, match="are free there"):
        durable.require_space(tmp_path / "new" / "out", 2**60)


def test_json_holds_a_path_that_is_not_utf8_as_text(tmp_path: Path) -> None:
    durable.write_json(tmp_path / "a.json", {"path": os.fsdecode(b"men\xe9")})
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == {"path": "men\\udce9"}
    durable.write_text(tmp_path / "a.txt", "men\udce9")
    assert (tmp_path / "a.txt").read_bytes() == b"men\\udce9"


def ended_process() -> int:
    """The number of a process that has ended."""
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)
    return child


def test_what_a_killed_writer_left_goes_when_the_same_file_is_written(tmp_path: Path) -> None:
    left = tmp_path / f".tmp-a.json-{ended_process()}-01234567"
    others = [
        tmp_path / f".tmp-a.json-{os.getpid()}-01234567",
        tmp_path / f".tmp-b.json-{ended_process()}-01234567",
        tmp_path / ".tmp-a.json",
    ]
    for path in (left, *others):
        path.write_text("half")
    durable.write_text(tmp_path / "a.json", "{}")
    assert not left.exists()
    assert all(path.exists() for path in others)


def test_files_of_which_some_have_their_names_are_taken_back(tmp_path: Path) -> None:
    left = tmp_path / f".tmp-a-{ended_process()}-01234567"
    left.mkdir()
    for name in ("a", "a.more"):
        (left / name).write_text("new")
    (tmp_path / "a.more").hardlink_to(left / "a.more")
    (tmp_path / "else").write_text("another's")
    durable.refuse_occupied(tmp_path / "a")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["else"]


def test_files_that_all_have_their_names_stay(tmp_path: Path) -> None:
    left = tmp_path / f".tmp-a-{ended_process()}-01234567"
    left.mkdir()
    for name in ("a", "a.more"):
        (left / name).write_text("new")
        (tmp_path / name).hardlink_to(left / name)
    with pytest.raises(ConfigError, match="exists already"):
        durable.refuse_occupied(tmp_path / "a")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "a.more"]


def test_files_never_replace_another_unless_asked(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("old")

    def publish(overwrite: bool) -> None:
        with durable.publish_files(tmp_path / "a", overwrite) as folder:
            (folder / "a").write_text("new")
            (folder / "b").write_text("new")

    with pytest.raises(CheckpointError, match="EEXIST"):
        publish(overwrite=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a"]
    assert (tmp_path / "a").read_text() == "old"
    publish(overwrite=True)
    assert (tmp_path / "a").read_text() == (tmp_path / "b").read_text() == "new"


@pytest.mark.parametrize(
    ("target", "names", "last"),
    [
        ("out.jsonl", ["out.jsonl", "out-removed.jsonl", "manifest.json"], "out.jsonl"),
        ("m.gguf", ["m-00001-of-00002.gguf", "m-00002-of-00002.gguf"], "m-00001-of-00002.gguf"),
    ],
)
def test_the_file_that_is_opened_gets_its_name_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str, names: list[str], last: str
) -> None:
    named: list[str] = []
    monkeypatch.setattr(durable, "_name_also", lambda file, target, _: named.append(target.name))
    with durable.publish_files(tmp_path / target) as folder:
        for name in names:
            (folder / name).write_text("new")
    assert sorted(named) == sorted(names) and named[-1] == last


def test_a_folder_is_deleted_under_another_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    names: list[str] = []
    monkeypatch.setattr(shutil, "rmtree", lambda path, **_: names.append(Path(path).name))
    durable.remove_tree(folder)
    (name,) = names
    assert name.startswith(".tmp-model-") and not folder.exists()
    monkeypatch.undo()
    durable.remove_tree(folder)  # what is not there is no fault
