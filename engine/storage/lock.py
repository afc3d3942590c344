"""One writer per directory, by an advisory `flock`.

The kernel drops the lock when its process ends: a lock file that a killed process leaves behind
blocks nobody, and its content (process id and host) is only there to be shown.
"""

import errno
import json
import os
import socket
import stat
import time
from pathlib import Path
from typing import Any, Self

from engine.errors import ConfigError
from engine.storage.durable import describe, process_lives
from engine.storage.safe_files import json_object_or_empty

try:
    import fcntl
except ImportError:  # Windows has no flock; a run there has no guard against a second writer
    fcntl = None  # type: ignore[assignment]

LOCK_NAME = ".lock"
_TAKEN = (errno.EWOULDBLOCK, errno.EACCES)
_ATTEMPTS = 10
# Never through a link, and no pipe that would wait.
_CAUTION = sum(getattr(os, name, 0) for name in ("O_CLOEXEC", "O_NOFOLLOW", "O_NONBLOCK"))


class DirectoryLock:
    """Holds `<directory>/.lock` from construction until `release`. Raises `ConfigError`.

    Without `sign` the file's bytes stay as they are until `sign` is called.
    """

    def __init__(self, directory: Path, *, sign: bool = True) -> None:
        self.path = directory / LOCK_NAME
        self._descriptor: int | None = None
        try:
            self._descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | _CAUTION, 0o666)
            if not stat.S_ISREG(os.fstat(self._descriptor).st_mode):
                raise OSError(f"its {LOCK_NAME} is no regular file")
            if not take(self._descriptor):
                holder = read_holder(directory)
                who = f" (process {holder['pid']} on {holder['host']})" if holder else ""
                raise ConfigError(
                    f"Another run{who} is writing to {directory}. Wait for it to end, or choose "
                    "another directory with --output-dir."
                )
            if sign:
                self.sign()
        except OSError as error:
            self.release()
            raise ConfigError(
                f"The directory {directory} cannot be written to or locked: {describe(error)}. "
                "Choose another with --output-dir."
            ) from None
        except ConfigError:
            self.release()
            raise

    def sign(self) -> None:
        """Write down who holds the lock."""
        assert self._descriptor is not None
        note = json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode()
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, note, 0)

    @property
    def locked(self) -> bool:
        """Whether this object still holds the lock."""
        return self._descriptor is not None

    def release(self) -> None:
        """Let go of the lock; a second call does nothing. The file stays: its inode is the lock."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *raised: object) -> None:
        self.release()


def take(descriptor: int) -> bool:
    """Lock an open file until it is closed; whether no other process holds the lock.

    Tries for half a second: `is_locked` in another process holds a lock for an instant.
    """
    for _ in range(_ATTEMPTS):
        try:
            if fcntl is not None:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in _TAKEN:
                raise
            time.sleep(0.5 / _ATTEMPTS)
        else:
            return True
    return False


def read_holder(directory: Path) -> dict[str, Any] | None:
    """Process id and host that were last written to the lock, or None where there are none."""
    note = json_object_or_empty(directory / LOCK_NAME)
    if not {"pid", "host"} <= note.keys() or not _may_live(note):
        return None
    return note


def _may_live(note: dict[str, Any]) -> bool:
    """Whether the process of a note may hold a lock: one of this host that has ended does not."""
    pid = note["pid"]
    if note["host"] != socket.gethostname() or not isinstance(pid, int):
        return True
    return process_lives(pid)


def is_locked(directory: Path) -> bool:
    """Whether some live process holds the lock. Never waits and changes nothing."""
    try:
        descriptor = os.open(directory / LOCK_NAME, os.O_RDONLY | _CAUTION)
    except OSError:
        return False
    try:
        if fcntl is None:
            return False
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno in _TAKEN
    finally:
        os.close(descriptor)
    return False
