"""Save checkpoints on file systems of many sizes, in a mount namespace.

`python -m bench.torture.full_disk FOLDER COUNT` prints one JSON object: `loadable`, sizes after
which the older checkpoint loads, and `named`, sizes at which a full disk was a named error.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from engine.errors import CheckpointError
from engine.runs.checkpoints import CheckpointStore


class Unchecked(CheckpointStore):
    """Without the check ahead of time, which would end every trial before it began."""

    def _require_space(self, tensors: object) -> None:
        return


@contextmanager
def small_disk(folder: Path, kibibytes: int) -> Iterator[None]:
    """A file system of this size at `folder`, in memory."""
    folder.mkdir(parents=True, exist_ok=True)
    size = f"size={kibibytes}k"
    subprocess.run(["mount", "-t", "tmpfs", "-o", size, "tmpfs", str(folder)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def one_size(folder: Path, kibibytes: int) -> tuple[bool, bool]:
    """Whether the first checkpoint loads in the end, and whether the failure was named."""
    with small_disk(folder, kibibytes):
        tensors = {"a": {"x": torch.ones(64, 1024)}}  # 256 KiB
        named = False
        with Unchecked(folder, keep=2) as store:
            store.save(1, tensors, {"step": 1})
            (folder / "others").write_bytes(b"\0" * 1024 * (kibibytes % 97))
            try:
                for step in range(2, 40):
                    (folder / f"filler-{step}").write_bytes(b"\0" * 65_536)
                    store.save(step, tensors, {"step": step})
            except CheckpointError as error:
                named = str(folder) in str(error)
            except OSError:
                # The filler itself met the end of the disk.
                try:
                    store.save(99, tensors, {"step": 99})
                except CheckpointError as error:
                    named = str(folder) in str(error)
            left = store.latest()
            return left is not None and left.step >= 1, named


def main(folder: Path, count: int) -> None:
    torch.set_num_threads(1)
    results = [one_size(folder, 600 + 13 * number) for number in range(count)]
    print(
        json.dumps(
            {
                "trials": count,
                "loadable": sum(loads for loads, _ in results),
                "named": sum(named for _, named in results),
            }
        )
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
