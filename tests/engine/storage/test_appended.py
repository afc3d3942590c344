"""A file of lines that the disk refuses is named, with what is safe."""

import errno
import os
from pathlib import Path

import pytest

from engine.errors import CheckpointError
from engine.storage.appended import AppendedLines


def test_lines_that_the_disk_does_not_confirm_are_a_named_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = AppendedLines(tmp_path / "metrics.jsonl", b"1\n")
    lines.append("2\n")

    def refuse(descriptor: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(
        CheckpointError, match=r"metrics\.jsonl: Input/output error \(EIO\).*resume"
    ):
        lines.sync()
    lines.close()
    assert (tmp_path / "metrics.jsonl").read_text() == "1\n2\n"


def test_a_line_that_cannot_be_written_is_a_named_error_once(tmp_path: Path) -> None:
    lines = AppendedLines(tmp_path / "metrics.jsonl")
    os.close(lines._file.fileno())
    with pytest.raises(CheckpointError, match=r"Cannot append to .*metrics\.jsonl: .*EBADF"):
        lines.append("1\n")
    lines.close()


def test_a_file_that_cannot_be_made_is_a_named_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"Cannot write .*absent/metrics\.jsonl"):
        AppendedLines(tmp_path / "absent" / "metrics.jsonl")
