import os
from pathlib import Path

import pytest

from engine.errors import ConfigError
from engine.storage.lock import DirectoryLock, is_locked, read_holder


@pytest.mark.parametrize("kind", ["pipe", "link", "device", "folder"])
def test_a_lock_that_is_no_regular_file_is_refused_and_never_written(
    kind: str, tmp_path: Path
) -> None:
    other, lock = tmp_path / "other", tmp_path / "run" / ".lock"
    lock.parent.mkdir()
    other.write_text("precious")
    if kind == "pipe":
        os.mkfifo(lock)
    elif kind == "folder":
        lock.mkdir()
    else:
        lock.symlink_to(other if kind == "link" else "/dev/zero")
    with pytest.raises(ConfigError, match="cannot be written to or locked"):
        DirectoryLock(lock.parent)
    assert not is_locked(lock.parent)  # and does not wait for a writer of the pipe
    assert read_holder(lock.parent) is None
    assert other.read_text() == "precious"
