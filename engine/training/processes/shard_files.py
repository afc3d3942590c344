"""Files of one checkpoint that several processes write, each its own.

The first process makes the checkpoint's folder under a temporary name and tells it to all. Each
writes its file there, durably, and says how that went; only where all are well does the first write
the manifest, which covers every file, and give the folder its name. So a checkpoint that can be
seen holds the files of all, and a disk that is full for one process ends the save for all, in that
one's name. All processes must see one folder: on several machines it lies on a shared file system.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor

from engine.distributed.messages import broadcast_text, gather_texts
from engine.errors import CheckpointError
from engine.model_sources.safetensors.file import SafetensorsFile, save_file
from engine.runs.checkpoints import refuse_nonfinite
from engine.storage import durable, names
from kernels.runtime.ranks import Ranks

Files = Mapping[str, Mapping[str, Tensor]]
"""Kind of a file -> its tensors."""


def shard_name(kind: str, rank: int) -> str:
    """Where in a checkpoint a process keeps its tensors of a kind."""
    return f"{kind}/rank-{rank}.safetensors"


class ShardFiles:
    """What one process of `ranks` adds to the checkpoint of a step."""

    def __init__(self, ranks: Ranks, step: int, files: Files) -> None:
        self._ranks, self._step, self._files = ranks, step, files

    @contextmanager
    def led(self) -> Iterator[None]:
        """Around what the first process does; the others wait in `follow` until the block ends."""
        try:
            yield
        finally:
            broadcast_text(self._ranks, "")

    def follow(self) -> None:
        """For the others: write where the first says, as often as it asks."""
        while folder := broadcast_text(self._ranks, ""):
            gather_texts(self._ranks, self._write(Path(folder)))

    def written_by_all(self, folder: Path) -> None:
        """For the first process, inside `led`: let all write into a folder.

        Raises `CheckpointError` with the words of the first that could not.
        """
        broadcast_text(self._ranks, str(folder))
        for problem in gather_texts(self._ranks, self._write(folder)):
            if problem:
                raise CheckpointError(problem)

    def _write(self, folder: Path) -> str:
        """Write this process's files; what went wrong, or nothing."""
        try:
            refuse_nonfinite(self._step, self._files)
            for kind, tensors in self._files.items():
                path = folder / shard_name(kind, self._ranks.rank)
                names.mkdir(path.parent, exist_ok=True)
                save_file(tensors, path)
            durable.fsync_dir(folder)
        except (OSError, CheckpointError) as error:
            return f"Rank {self._ranks.rank} on {socket.gethostname()}: {error}"
        return ""


class ShardTensors(Mapping[str, Tensor]):
    """The tensors of one process's file, each read when it is asked for."""

    def __init__(self, folder: Path, kind: str, rank: int) -> None:
        path = folder / shard_name(kind, rank)
        if not path.is_file():
            raise CheckpointError(
                f"{path} is not there, which a checkpoint of divided weights has of every process. "
                "On several machines the run's directory must lie on a file system that all see."
            )
        self._file = SafetensorsFile(path)
        self._names = dict.fromkeys(self._file.keys())

    def __getitem__(self, name: str) -> Tensor:
        return self._file.tensor(name)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)
