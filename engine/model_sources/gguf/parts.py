"""A GGUF model in several files, read as one.

llama.cpp's gguf-split writes `NAME-00001-of-00003.gguf` and so on. Every part says in `split.no`
which one it is and in `split.count` of how many; the first holds all other metadata, and
`split.tensors.count` is the number of tensors of the whole model.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np

from engine.errors import CheckpointError, ConfigError, listing
from engine.model_sources.gguf.container import GGUFFile, TensorInfo

_NAME = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.ASCII)
# A vision projector is a file of its own beside the model.
_PROJECTOR = "mmproj"


class GGUFParts:
    """One GGUF model: its metadata, and the tensors of all its files.

    Attributes:
        path: the file that was named.
        paths: all files of the model, in order.
        metadata: that of the first file.
        tensors: name -> where it lies in its file, in the order of the files.

    Raises `CheckpointError` for a damaged file and for parts that do not belong together, and
    `ConfigError` where one is missing.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        opened = GGUFFile(self.path)
        count = _number(opened, "split.count", 1)
        self._files = [opened] if count <= 1 else _open_all(opened, count)
        self.paths = [file.path for file in self._files]
        self.metadata: dict[str, Any] = self._files[0].metadata
        self.tensors: dict[str, TensorInfo] = {}
        self._home: dict[str, GGUFFile] = {}
        for file in self._files:
            twice = sorted(self._home.keys() & file.tensors.keys())
            if twice:
                other = self._home[twice[0]].path.name
                raise CheckpointError(
                    f"{file.path} holds {len(twice)} tensors that stand in {other} too: "
                    f"{listing(twice)}. One of the two belongs to another model or is a copy "
                    "under another name; download the parts again, from one revision."
                )
            self.tensors |= file.tensors
            self._home |= dict.fromkeys(file.tensors, file)
        total = _number(self._files[0], "split.tensors.count", len(self.tensors))
        if count > 1 and total != len(self.tensors):
            raise CheckpointError(
                f"{self.paths[0]} and its {count - 1} further parts hold {len(self.tensors)} "
                f"tensors, and the model has {total}: a part belongs to another model. Download "
                "the parts again, from one revision."
            )

    def raw(self, name: str) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """The stored bytes of tensor `name`, as a read-only view of its mapped file."""
        return self._home[name].raw(name)

    def release(self, name: str) -> None:
        """Let the system drop the pages of tensor `name`; they are read again when needed."""
        self._home[name].release(name)


def part_names(name: str) -> list[str]:
    """Names of all parts of the model that the file `name` is a part of; itself if of none."""
    match = _NAME.fullmatch(name)
    count = int(match["count"]) if match is not None else 0
    if match is None or not count:
        return [name]
    return [f"{match['stem']}-{number:05d}-of-{count:05d}.gguf" for number in range(1, count + 1)]


def lone_model(folder: Path) -> Path | None:
    """The one GGUF model in a folder, whole or any of its parts; None for none or several."""
    files = [path for path in sorted(folder.glob("*.gguf")) if not path.name.startswith(_PROJECTOR)]
    # Of a name's many parts none is spelt out, for any number of files.
    named = {path: _NAME.fullmatch(path.name) for path in files}
    models = {path.name if m is None else m.group("stem", "count") for path, m in named.items()}
    return files[0] if len(models) == 1 else None


def _open_all(opened: GGUFFile, count: int) -> list[GGUFFile]:
    """The parts of the model that `opened` is one of, each checked to be what its name says."""
    names = part_names(opened.path.name)
    if len(names) != count:
        raise ConfigError(
            f"{opened.path} is one of {count} parts of a model, and its name does not tell where "
            f"the others are; expected NAME-00001-of-{count:05d}.gguf and so on, in one folder. "
            "Give the parts the names they were published with."
        )
    paths = [opened.path.with_name(name) for name in names]
    absent = [path.name for path in paths if not path.exists()]
    if absent:
        raise ConfigError(
            f"{opened.path} is one of {count} parts of a model, of which {len(absent)} are missing "
            f"in {opened.path.parent}: {listing(absent)}. Download them into the same folder."
        )
    files = [opened if path == opened.path else GGUFFile(path) for path in paths]
    for number, file in enumerate(files):
        said = _number(file, "split.no", -1), _number(file, "split.count", 1)
        if said != (number, count):
            is_part = f"part {said[0] + 1} of {said[1]}" if said[1] > 1 else "a whole model"
            raise CheckpointError(
                f"{file.path} is {is_part} by its own word, and its name says part {number + 1} of "
                f"{count}: it was renamed, or belongs to another model. Download it again."
            )
    return files


def _number(file: GGUFFile, key: str, default: int) -> int:
    value = file.metadata.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int):
        raise CheckpointError(f"{file.path}: {key} is {str(value)[:80]!r}; expected a number.")
    return value
