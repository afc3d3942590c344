"""Names of the hub: organisation/name, with a revision and a file."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

RepositoryKind = Literal["model", "dataset"]

_REPOSITORY = r"(?P<repository>[A-Za-z0-9][\w.\-]*/[\w.\-]+)"
_REVISION = r"(?:@(?P<revision>\w[\w.\-/]*?))?"
_NAME = re.compile(_REPOSITORY + _REVISION)
_FILE = re.compile(_REPOSITORY + _REVISION + r"/(?P<file>\w[\w.\-/]*\.gguf)")


@dataclass(frozen=True)
class HubName:
    """A repository of the hub at a branch, tag or commit; `file` is one of its files."""

    repository: str
    revision: str | None = None
    file: str | None = None
    kind: RepositoryKind = "model"

    def __str__(self) -> str:
        return self.repository if self.revision is None else f"{self.repository}@{self.revision}"

    def command(self) -> str:
        """The command that downloads it into the cache."""
        words = ["hf download", self.repository]
        words += [self.file] if self.file else []
        words += ["--repo-type dataset"] if self.kind == "dataset" else []
        words += [f"--revision {self.revision}"] if self.revision else []
        return " ".join(words)


def hub_name(
    name: str, revision: str | None = None, kind: RepositoryKind = "model"
) -> HubName | None:
    """`name` as a name of the hub, such as `org/name`, `org/name@rev` or `org/name/file.gguf`.

    `revision` counts where the name has none. None for what can only be a path here: what has
    another form, or lies below a folder that exists.
    """
    match = _FILE.fullmatch(name) or _NAME.fullmatch(name)
    if match is None or Path(match["repository"]).parent.is_dir():
        return None
    parts = match.groupdict()
    return HubName(parts["repository"], parts["revision"] or revision, parts.get("file"), kind)
