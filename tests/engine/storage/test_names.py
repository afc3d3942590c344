"""Calls on names that a signal interrupts: not done yet, done already, and for ever."""

import ast
import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from engine.storage import durable, names
from tests.support.source_tree import product_sources

CALLS: dict[str, tuple[str, Callable[[Path], None], Callable[[Path], bool]]] = {
    "rename": (
        "replace",
        lambda f: names.rename(f / "a", f / "b"),
        lambda f: not (f / "a").exists() and (f / "b").read_text() == "a",
    ),
    "folder": (
        "replace",
        lambda f: names.rename(f / "folder", f / "other"),
        lambda f: not (f / "folder").exists() and (f / "other/inside").exists(),
    ),
    "hardlink": (
        "link",
        lambda f: names.hardlink(f / "b2", f / "a"),
        lambda f: (f / "b2").exists() and (f / "a").samefile(f / "b2"),
    ),
    "mkdir": ("mkdir", lambda f: names.mkdir(f / "new"), lambda f: (f / "new").is_dir()),
    "unlink": ("unlink", lambda f: names.unlink(f / "a"), lambda f: not (f / "a").exists()),
    "rmdir": ("rmdir", lambda f: names.rmdir(f / "empty"), lambda f: not (f / "empty").exists()),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("a", "b"):
        (tmp_path / name).write_text(name)
    (tmp_path / "empty").mkdir()
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/inside").touch()
    return tmp_path


def interrupt(patch: pytest.MonkeyPatch, function: str, times: int, done: bool) -> list[int]:
    """Let a call of `os` end by EINTR so often, the first of them after it was `done`."""
    real, calls = getattr(os, function), []

    def call(*args: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) > times:
            return real(*args, **options)
        if done and len(calls) == 1:
            real(*args, **options)
        raise InterruptedError(errno.EINTR, os.strerror(errno.EINTR), str(args[0]))

    patch.setattr(os, function, call)
    return calls


@pytest.mark.parametrize("done", [False, True])
@pytest.mark.parametrize("times", [1, 3])
@pytest.mark.parametrize("name", CALLS)
def test_an_interrupted_call_is_made_once_more(
    name: str, times: int, done: bool, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    function, call, is_done = CALLS[name]
    calls = interrupt(monkeypatch, function, times, done)
    call(folder)
    assert len(calls) == (1 if done else times + 1)
    monkeypatch.undo()
    assert is_done(folder)


@pytest.mark.parametrize("name", CALLS)
def test_signals_without_end_are_an_error(
    name: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    function, call, is_done = CALLS[name]
    interrupt(monkeypatch, function, 10_000, done=False)
    with pytest.raises(InterruptedError):
        call(folder)
    monkeypatch.undo()
    assert not is_done(folder)


@pytest.mark.parametrize("times", [1, 3])
def test_an_interrupted_listing_is_made_anew(
    times: int, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = interrupt(monkeypatch, "listdir", times, done=True)
    assert sorted(names.listed(folder)) == ["a", "b", "empty", "folder"]
    assert len(calls) == times + 1


def test_of_a_folder_that_cannot_go_all_that_can_goes(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in "abc":
        (folder / "folder" / name).write_text(name)
    unlink = os.unlink

    def refused(path: Any, **options: Any) -> None:
        if Path(path).name == "inside":
            raise PermissionError(errno.EPERM, "Operation not permitted", path)
        unlink(path, **options)

    monkeypatch.setattr(os, "unlink", refused)
    with pytest.raises(PermissionError, match="inside"):
        names.rmtree(folder / "folder")
    assert [path.name for path in (folder / "folder").iterdir()] == ["inside"]


def test_only_what_was_moved_counts_as_done(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that had the target's name before is not taken for the one that was to get it."""
    real = os.replace

    def lost(source: Path, target: Path) -> None:
        if source.exists():
            source.unlink()
            raise InterruptedError(errno.EINTR, "interrupted")
        real(source, target)

    monkeypatch.setattr(os, "replace", lost)
    with pytest.raises(FileNotFoundError):
        names.rename(folder / "a", folder / "b")
    assert (folder / "b").read_text() == "b"


@pytest.mark.parametrize("function", ["replace", "mkdir", "link", "unlink", "rmdir"])
def test_outputs_appear_whatever_is_interrupted(
    function: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt(monkeypatch, function, 2, done=False)
    durable.write_text(tmp_path / "file", "text")
    with durable.publish_directory(tmp_path / "whole") as inside:
        (inside / "part").write_text("text")
    with durable.publish_files(tmp_path / "first") as inside:
        (inside / "first").write_text("text")
    durable.remove_tree(tmp_path / "whole")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "first"]


def test_names_are_changed_in_one_place() -> None:
    allowed = ("engine/storage/names.py", "engine/data/sources/spool.py", "cli/main.py")
    changing = {"mkdir", "rename", "unlink", "rmdir", "hardlink_to", "link_to", "renames"}
    others = [
        f"{path.as_posix()}:{call.lineno}"
        for path, source in product_sources().items()
        if path.as_posix() not in allowed
        for call in ast.walk(ast.parse(source))
        if isinstance(call, ast.Call)
        and isinstance(call.func, ast.Attribute)
        and call.func.attr in changing
        and ast.unparse(call.func.value) != "names"
    ]
    assert not others, "use engine.storage.names, which repeats a call that a signal interrupts"
