"""Open the files of a model folder safely.

A model folder may come from anywhere. Only regular files are opened: a pipe or a device would hang
or never end. A symbolic link is followed to a regular file wherever that lies, as other programs
do: the hub's cache keeps its files so, and people link a configuration or a shard from another
disk. What a file says is another matter: names in an index are plain names, which lead nowhere
else. And a link may lead to a secret, so what is read through one that leaves its folder is never
shown: an error about such a file says that it is not of its kind, and nothing of what it holds.
"""

from __future__ import annotations

import errno
import os
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager
from io import FileIO, TextIOWrapper
from pathlib import Path
from typing import Any, NoReturn

from engine.errors import CheckpointError, EngineError
from engine.storage.durable import describe
from engine.storage.strict_json import parse_object

# O_NONBLOCK: opening a pipe returns at once, so that it can be refused by what fstat says it is.
_READ_ONLY = (
    os.O_RDONLY
    | getattr(os, "O_CLOEXEC", 0)
    | getattr(os, "O_NOFOLLOW", 0)
    | getattr(os, "O_NONBLOCK", 0)
    | getattr(os, "O_BINARY", 0)
)
_PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
# A zip archive, which is what torch.save writes, or a bare pickle of protocol 2 to 5.
_PICKLE_HEADS = (b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
MIB = 2**20
STAND_IN_BYTES = 64
"""How much of a file's beginning tells what stands in its stead."""

_NOT_REGULAR = "{} is not a regular file: pipes, devices and folders are not read in its place."
_PATIENCE = 3.0
"""Seconds that a pipe which the user names may take to get a writer."""

_BYTES_PER_VALUE = 16
"""A file of JSON may have one value for so many of the bytes that it may have."""


def open_regular(path: Path) -> int:
    """A read-only descriptor of the regular file `path`, which the caller closes.

    Raises `CheckpointError` if it is missing or, where a link leads too, no regular file.
    """
    try:
        # Path.resolve raises RuntimeError for links in a circle before Python 3.13; this OSError.
        target = os.path.realpath(path, strict=True) if path.is_symlink() else path
        # A device may do something when it is opened; what changes in between, fstat sees.
        if not stat.S_ISREG(os.lstat(target).st_mode):
            raise CheckpointError(_NOT_REGULAR.format(path))
        descriptor = os.open(target, _READ_ONLY)
    except OSError as error:
        raise CheckpointError(f"Cannot open {path}: {describe(error)}.") from error
    try:
        with reading(path):
            regular = stat.S_ISREG(os.fstat(descriptor).st_mode)
        if not regular:
            raise CheckpointError(_NOT_REGULAR.format(path))
    except CheckpointError:
        os.close(descriptor)
        raise
    return descriptor


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Around what reads `path`: an `OSError` becomes a `CheckpointError` that names it."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(
            f"Cannot read {path}: {describe(error)}. Check that disk, or copy the file again."
        ) from error


def append_regular(path: Path, errors: str = "strict") -> TextIOWrapper:
    """Open `path` to append UTF-8 text; made if missing, never followed if a link.

    Raises `OSError` for a link, a pipe or a device.
    """
    return os.fdopen(_made_regular(path, os.O_APPEND), "a", encoding="utf-8", errors=errors)


def write_regular(path: Path) -> FileIO:
    """Open `path`, emptied, for a log that grows; never followed if a link.

    It has no buffer, so that a full disk is met by the write that it refuses. Raises `OSError` for
    a link, a pipe or a device.
    """
    return FileIO(_made_regular(path, os.O_TRUNC), "wb")


def _made_regular(path: Path, how: int) -> int:
    flags = os.O_WRONLY | os.O_CREAT | how | (_READ_ONLY & ~os.O_RDONLY)
    descriptor = os.open(path, flags, 0o666)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "Not a regular file", str(path))
    return descriptor


def read_regular(path: Path, limit: int) -> bytes:
    """The whole content of `path`, at most `limit` bytes. Raises `CheckpointError`."""
    descriptor = open_regular(path)
    with reading(path), os.fdopen(descriptor, "rb") as handle:
        # A read of the limit itself would ask for that much memory first.
        size = min(os.fstat(descriptor).st_size, limit)
        data = handle.read(size)
        while len(data) <= limit and (more := handle.read(MIB)):
            data += more
    if len(data) > limit:
        raise CheckpointError(
            f"{path} holds more than {limit / MIB:.0f} MiB, more than any file of its kind."
        )
    return data


def refuse_stand_in(head: bytes, source: str) -> None:
    """Raise `CheckpointError` for what downloads leave in the stead of a file, by its first bytes.

    A clone without Git LFS leaves pointers, and a download that is refused a page that says so.
    """
    if head.startswith(b"version https://git-lfs"):
        raise CheckpointError(
            f"{source} is a pointer of Git LFS: the file itself was not downloaded. Run `git lfs "
            "pull` in that folder, or download the file."
        )
    if head.lstrip()[:9].lower().startswith((b"<!doctype", b"<html")):
        raise CheckpointError(
            f"{source} is a web page that was saved in the file's stead. Open it to read why, and "
            "download the file itself."
        )


def read_text(path: Path, limit: int = 4 * MIB) -> str:
    """The content of `path`, which must be UTF-8. Raises `CheckpointError`."""
    try:
        return read_regular(path, limit).decode("utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointError(
            f"{path} is not UTF-8 text (byte {error.start}: {error.reason}); copy it again."
        ) from error


def read_json_object(
    path: Path, error: type[EngineError] = CheckpointError, limit: int = 4 * MIB
) -> dict[str, Any]:
    """Parse the JSON object in `path`; whatever is wrong with the file raises `error`.

    `limit` is in bytes: a configuration has some thousands. Reading takes the more memory the
    smaller the values are, so their number is limited too.
    """
    try:
        data = read_regular(path, limit)
        refuse_stand_in(data, str(path))
        refuse_many(data, limit // _BYTES_PER_VALUE, str(path))
    except CheckpointError as problem:
        raise error(str(problem)) from problem
    with not_shown(path):
        return parse_object(data, str(path), error)


def refuse_many(data: bytes, most: int, source: str) -> None:
    """Raise `CheckpointError` for a JSON text of more than `most` values, which is then not read.

    What stands around values is counted, also in texts.
    """
    if len(data) > most and sum(data.count(mark) for mark in (b"[", b"{", b":", b",")) > most:
        raise CheckpointError(
            f"{source} holds more than {most:,} values, more than any file of its kind. It is "
            "damaged, or made to fill the memory; fetch it again."
        )


def json_object_or_empty(path: Path) -> dict[str, Any]:
    """The JSON object in `path`; empty where there is none that can be read."""
    try:
        return read_json_object(path)
    except CheckpointError:
        return {}


def read_given(path: Path, limit: int) -> bytes:
    """The first `limit` bytes and one more of a file that the user names, which may be a pipe.

    Raises `OSError`, also for a pipe that nobody writes to.
    """
    if not stat.S_ISFIFO(path.stat().st_mode):
        with path.open("rb") as file:
            return file.read(limit + 1)
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    with os.fdopen(descriptor, "rb", buffering=0) as pipe:
        ends = time.monotonic() + _PATIENCE
        # Without a writer there is nothing to read, and with a silent one `None`.
        while (begun := pipe.read(1)) == b"":
            if time.monotonic() > ends:
                raise OSError(errno.EPIPE, "it is a pipe that nobody writes to")
            time.sleep(0.02)
        os.set_blocking(descriptor, True)
        data = begun or b""
        while len(data) <= limit and (more := pipe.read(limit + 1 - len(data))):
            data += more
        return data


def is_pickle(path: Path) -> bool:
    """Whether `path` is a pickle by its name, or by its first bytes (a pickle or a zip file)."""
    if path.suffix in _PICKLE_SUFFIXES:
        return True
    head = read_head(path, 4)
    return head.startswith(_PICKLE_HEADS)


def read_head(path: Path, size: int) -> bytes:
    """The first `size` bytes of `path`, or fewer. Raises `CheckpointError`."""
    descriptor = open_regular(path)
    with reading(path), os.fdopen(descriptor, "rb") as handle:
        return handle.read(size)


def refuse_pickle(path: Path) -> NoReturn:
    """Raise the `CheckpointError` for a model file that is a pickle."""
    raise CheckpointError(
        f"{path} is a pickle, which can run code when it is opened, so it is never read. Take the "
        "model's safetensors files, or convert this one with a program and in a place you trust."
    )


def leads_outside(path: Path) -> bool:
    """Whether `path` is a link to a file that is neither beside it nor in the hub's cache.

    What a model's download never makes, so that it may lead to something that is no model's.
    """
    if not path.is_symlink():
        return False
    target = Path(os.path.realpath(path))
    cache = hub_cache_folder(path.parent)
    inside = target.is_relative_to(path.parent.resolve()) or (
        cache is not None and target.is_relative_to(cache)
    )
    return not inside and hub_cache_folder(target.parent, ("blobs", "snapshots")) is None


@contextmanager
def not_shown(*paths: Path) -> Iterator[None]:
    """Around what reads the content of small files: an `EngineError` shows nothing behind a link.

    Where one of `paths` leads outside, the error is another one of its type that names the link.
    """
    try:
        yield
    except EngineError as error:
        linked = [path for path in paths if leads_outside(path)]
        if not linked:
            raise
        links = ", ".join(f"{path} (to {os.path.realpath(path)})" for path in linked)
        raise type(error)(
            f"Not a file that can be used in its place: {links}. It is a link out of the model's "
            "folder, so what it holds is not shown. Look at it, or put a copy of the file itself "
            "in the folder to be told what is wrong with it."
        ) from None


def hub_cache_folder(folder: Path, parts: tuple[str, ...] = ("snapshots",)) -> Path | None:
    """The `models--org--name` folder if `folder` lies in one of its `parts`, else None."""
    absolute = folder.resolve()
    for snapshots in (absolute, *absolute.parents):
        if snapshots.name in parts and snapshots.parent.name.startswith("models--"):
            return snapshots.parent
    return None
