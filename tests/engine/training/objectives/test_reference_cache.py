"""Values of the reference that are stored: whatever stands in their place, the same come."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from engine.training.objectives.reference import stored_or_made

TABLE = torch.tensor([[-1.5, -2.25]], dtype=torch.float64)


@pytest.mark.parametrize(
    "put",
    [
        os.mkfifo,
        lambda path: path.symlink_to("/dev/zero"),
        lambda path: path.symlink_to(path),
        lambda path: path.mkdir(),
        lambda path: path.write_bytes(bytes(48)),
        lambda path: path.write_bytes(b""),
    ],
)
def test_what_is_no_stored_table_is_made_again_and_waits_for_nobody(
    put: Callable[[Path], object], tmp_path: Path
) -> None:
    asked: list[int] = []

    def make() -> torch.Tensor:
        asked.append(1)
        return TABLE

    assert torch.equal(stored_or_made(tmp_path, {"a": 1}, (1, 2), make), TABLE)
    (stored,) = tmp_path.iterdir()
    stored.unlink()
    put(stored)
    assert torch.equal(stored_or_made(tmp_path, {"a": 1}, (1, 2), make), TABLE)
    assert len(asked) == 2
    if stored.is_file():
        assert torch.equal(stored_or_made(tmp_path, {"a": 1}, (1, 2), make), TABLE)
        assert len(asked) == 2
