"""Durable writes for all that must survive a crash.

A file appears under its final name whole or not at all, whatever kills the process or the machine:

1. write to a temporary name in the same folder (a rename across file systems is a copy),
2. fsync the file, so that its bytes are on the disk before its name is,
3. rename it over the final name (atomic on a POSIX file system),
4. fsync the folder, so that the new name is on the disk too.

`publish_directory` does the same for a whole folder, `publish_files` for files of one folder.
Temporary names start with `.tmp-` and hold the name that is written and the writer's process; what
a writer that was killed leaves under such names goes when the same output is written again. Files
get the mode that the umask allows, not 0600 as `tempfile` would give them: a model
is written to be read by others.

Every `OSError` of a write becomes a `CheckpointError` that names the path, the system's own words,
what is safe and, where the disk is full, what is left on it and what was needed. A flush of the
folder that fails after the rename is an `UnconfirmedError`: the output is whole.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from engine.errors import CheckpointError, ConfigError, gib
from engine.storage import names

TEMPORARY_PREFIX = ".tmp-"
_EXCLUSIVE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_CLOEXEC", 0)
_SURROGATE = re.compile("[\ud800-\udfff]")
_FULL = (errno.ENOSPC, errno.EDQUOT)
_OF_FILES = ".files"
"""Ends the temporary name of a folder whose files go beside it."""

_TEMPORARY = re.compile(rf"{re.escape(TEMPORARY_PREFIX)}(.+)-(\d+)-[0-9a-f]{{8}}({_OF_FILES})?")
_NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK)


class UnconfirmedError(CheckpointError):
    """An output is whole under its name, and the disk did not confirm the name."""


def write_bytes(path: Path | str, data: bytes | bytearray | memoryview) -> None:
    """Replace the content of `path` by `data`, durably. Raises `CheckpointError`."""
    with replacing(path, memoryview(data).nbytes) as handle:
        handle.write(data)


def write_text(path: Path | str, text: str) -> None:
    """Replace the content of `path` by `text` in UTF-8, durably. Raises `CheckpointError`."""
    write_bytes(path, text.encode("utf-8", errors="backslashreplace"))


def write_json(path: Path | str, value: Any) -> None:
    """Write `value` as indented JSON with sorted keys. NaN and infinity raise `ValueError`."""
    text = json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False)
    # Half of a surrogate pair, as in a path that is not UTF-8, is written as an escape's letters.
    write_text(path, _SURROGATE.sub(lambda match: f"\\\\u{ord(match[0]):x}", text) + "\n")


@contextlib.contextmanager
def replacing(path: Path | str, size: int | None = None) -> Iterator[BinaryIO]:
    """Open a temporary file next to `path`; on a clean exit it becomes `path`, else it is removed.

    With `size` the space is reserved first, so that a full disk is found before any work is done.
    Raises `CheckpointError` where the folder is missing, read-only or full.
    """
    path = Path(path)
    temporary = temporary_beside(path)
    published = False
    try:
        with writing(path, size):
            sweep_leftovers(path)
            with os.fdopen(os.open(temporary, _EXCLUSIVE, 0o666), "wb") as handle:
                if size:
                    _reserve(handle.fileno(), size)
                yield handle
                handle.flush()
                os.fsync(handle.fileno())
            names.rename(temporary, path)
            published = True
        _confirm(path)
    finally:
        if not published:
            # The failure that led here is the one to report; what is left carries its prefix.
            with contextlib.suppress(OSError):
                names.unlink(temporary)


@contextlib.contextmanager
def publish_directory(target: Path | str) -> Iterator[Path]:
    """Yield an empty temporary folder; on a clean exit it becomes `target`, else it is removed.

    `target` must not exist or be an empty folder: nothing a user has is ever overwritten
    (`ConfigError`). A failed write raises `CheckpointError`.
    """
    target = Path(os.path.abspath(target))  # noqa: PTH100 - resolve() would follow a link
    refuse_occupied(target)
    with _temporary_folder(target) as temporary:
        yield temporary
        with writing(target):
            fsync_tree(temporary)
            names.rename(temporary, target)
        _confirm(target)


@contextlib.contextmanager
def publish_files(target: Path, overwrite: bool = False) -> Iterator[Path]:
    """Yield an empty temporary folder; on a clean exit its files appear beside `target`.

    `target` appears last; where there is no such file, the first by name of those that begin as it
    does: where it stands, all stand. Without `overwrite` no file is replaced. Whoever calls refuses
    what is occupied before any work is done. A failed write, also one inside, raises
    `CheckpointError`.
    """
    with _temporary_folder(target, _OF_FILES) as temporary:
        with writing(target):
            yield temporary
            fsync_tree(temporary)
            files = sorted(temporary.iterdir(), reverse=True)
            files.sort(key=lambda f: (f.name == target.name, f.name.startswith(target.stem)))
            try:
                for file in files:
                    _name_also(file, target.with_name(file.name), overwrite)
            except OSError:
                _withdraw(temporary)
                raise
        _confirm(target)


def _name_also(file: Path, target: Path, overwrite: bool) -> None:
    """Give a file a second name, so that a second start knows by the first whose it is."""
    if overwrite:
        names.rename(file, target)
        return
    try:
        names.hardlink(target, file)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        names.rename(file, target)  # a file system without second names


def _withdraw(temporary: Path) -> None:
    """Take back the files that got their names out of a folder, unless all of them did."""
    files = list(temporary.iterdir())
    named = [file for file in files if _is_same(file, temporary.with_name(file.name))]
    if len(named) < len(files):
        for file in named:
            names.unlink(temporary.with_name(file.name))


def _is_same(file: Path, other: Path) -> bool:
    """Whether two names are of one regular file."""
    try:
        first, second = file.lstat(), other.lstat()
    except OSError:
        return False
    return stat.S_ISREG(first.st_mode) and os.path.samestat(first, second)


@contextlib.contextmanager
def _temporary_folder(target: Path, ending: str = "") -> Iterator[Path]:
    """A new folder beside `target`, removed in the end with what was not moved out of it."""
    temporary = target.with_name(temporary_beside(target).name + ending)
    with writing(target):
        names.mkdir(target.parent, parents=True, exist_ok=True)
        sweep_leftovers(target)
        names.mkdir(temporary)
    try:
        yield temporary
    finally:
        # A failure that led here is the one to report, not what else it leaves undeletable.
        with contextlib.suppress(OSError):
            names.rmtree(temporary)


def sweep_leftovers(target: Path) -> None:
    """Delete what processes that have ended left of this same output.

    Raises `OSError` where its folder cannot be listed; one that is missing holds nothing.
    """
    if not target.parent.is_dir():
        return
    for name in names.listed(target.parent):
        match = _TEMPORARY.fullmatch(name)
        if not match or match[1] != target.name[:80] or process_lives(int(match[2])):
            continue
        # Another start may sweep at the same time.
        with contextlib.suppress(OSError):
            entry = target.with_name(name)
            if entry.is_dir() and not entry.is_symlink():
                _withdraw(entry)
                names.rmtree(entry)
            else:
                names.unlink(entry)


def remove_tree(target: Path) -> None:
    """Delete a folder, if it is there, so that no part of it stands under its name meanwhile.

    Raises `CheckpointError` where it cannot be moved out of the way.
    """
    with writing(target):
        sweep_leftovers(target)
        if not target.is_dir():
            return
        doomed = temporary_beside(target)
        names.rename(target, doomed)
        fsync_dir(target.parent)
    with contextlib.suppress(OSError):
        names.rmtree(doomed)


def process_lives(pid: int) -> bool:
    """Whether a process of this machine has this number; True where that cannot be told."""
    if os.name != "posix" or pid < 1:
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def refuse_occupied(target: Path) -> None:
    """Raise `ConfigError` unless `target` does not exist or is an empty folder.

    What a writer that was killed left of this output is cleared away first.
    """
    with writing(target):
        sweep_leftovers(target)
        occupied = target.is_symlink() or (target.exists() and not target.is_dir())
        occupied = occupied or (target.is_dir() and any(target.iterdir()))
    if occupied:
        raise ConfigError(
            f"The output {target} exists already and is not an empty folder. Nothing was written; "
            "name another output, or move the old one away."
        )


@contextlib.contextmanager
def writing(path: Path, size: int | None = None) -> Iterator[None]:
    """Around what writes `size` bytes to `path`: an `OSError` becomes a `CheckpointError`."""
    try:
        yield
    except OSError as error:
        raise write_error(path, error, size) from error


def _confirm(path: Path) -> None:
    """Flush the name of `path`, which stands already, to the disk."""
    try:
        fsync_dir(path.parent)
    except OSError as error:
        raise UnconfirmedError(
            f"{final_name(path)} is written whole and can be used, but the disk did not confirm "
            f"its name: flushing the folder {final_name(path.parent)} failed with "
            f"{describe(error)}. After a loss of power it may be missing. Check that disk; to "
            "be sure, write it anew on another one."
        ) from error


def require_space(target: Path, size: int) -> None:
    """Raise `CheckpointError` unless the disk under `target` has space for `size` more bytes."""
    free = _free_bytes(target)
    if free is not None and free < size:
        raise CheckpointError(
            f"Writing {target} takes {gib(size)}, and {gib(free)} are free there. Nothing was "
            "written. Make room or name an output on another disk."
        )


def final_name(path: Path) -> Path:
    """`path` as it is called once it is whole: parts of it may have temporary names."""
    matches = ((part, _TEMPORARY.fullmatch(part)) for part in path.parts)
    return Path(*(m[1] if m else part for part, m in matches if m is None or not m[3]))


def temporary_beside(path: Path) -> Path:
    """A fresh temporary name in the folder of `path`."""
    unique = f"{os.getpid()}-{secrets.token_hex(4)}"
    return path.with_name(f"{TEMPORARY_PREFIX}{path.name[:80]}-{unique}")


def fsync_dir(path: Path | str) -> None:
    """Flush the names in folder `path` to the disk; Windows cannot, and needs no such call."""
    if os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_tree(root: Path) -> None:
    """Flush every file and folder below `root`, and `root` itself."""
    for folder, _, files in os.walk(root, topdown=False):
        for name in files:
            descriptor = os.open(Path(folder) / name, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        fsync_dir(folder)


def sha256_file(path: Path | str) -> str:
    """SHA-256 of the bytes of `path`, in hexadecimal. Raises `CheckpointError` if unreadable."""
    try:
        with Path(path).open("rb") as handle:
            return hashlib.file_digest(handle, "sha256").hexdigest()
    except OSError as error:
        raise CheckpointError(f"Cannot read {path}: {describe(error)}.") from error


def describe(error: OSError) -> str:
    """The system's words for `error` with its symbolic name, such as
    `No space left on device (ENOSPC)`."""
    code = error.errno
    if code is None:
        return str(error).rstrip(".") or type(error).__name__
    return f"{os.strerror(code)} ({errno.errorcode.get(code, code)})"


def write_error(path: Path, error: OSError, size: int | None = None) -> CheckpointError:
    """The `CheckpointError` to raise when writing `size` bytes to `path` failed with `error`."""
    message = f"Cannot write {final_name(path)}: {describe(error)}."
    if error.errno in _FULL:
        free, need = _free_bytes(path), "" if size is None else f"It takes {gib(size)}, and "
        if free is not None:
            message += f" {need}{gib(free)} are free there."
        hint = "Make room or name an output on another disk."
    elif error.errno in (errno.EEXIST, errno.ENOTEMPTY) and final_name(path).exists():
        hint = "Another program wrote it in the meantime: name another output, or move it away."
    elif error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        hint = "Name an output folder that you may write to."
    elif error.errno in (errno.ENOENT, errno.ENOTDIR, errno.EEXIST):
        hint = f"Its folder {final_name(path.parent)} has to exist, and to be one."
    else:
        hint = "Check that disk, or name an output on another one."
    return CheckpointError(f"{message} It was not written, and what stood there stays. {hint}")


def _free_bytes(path: Path) -> int | None:
    folder = next((parent for parent in path.parents if parent.is_dir()), None)
    return None if folder is None else shutil.disk_usage(folder).free


def _reserve(descriptor: int, size: int) -> None:
    if not hasattr(os, "posix_fallocate"):
        return
    try:
        os.posix_fallocate(descriptor, 0, size)
    except OSError as error:
        # Some file systems cannot reserve; there the write itself will find the disk full.
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
            raise
