"""Data sets of the Hugging Face hub, from the cache first.

Which files a split has says the front matter of the repository's README (`configs`), or their
names. Files are read as they are: no program of the repository is ever run.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import yaml

from engine.data.sources.file_kinds import DATA_SUFFIXES, TEXT_SUFFIXES, plain_suffix
from engine.data.sources.streams.compressed import SUFFIXES as COMPRESSED
from engine.errors import CheckpointError, DataError, EngineError
from engine.storage import strict_yaml
from engine.storage.safe_files import read_text

TRAIN = "train"
OTHER_SPLITS = ("test", "validation", "valid", "val", "dev", "eval", "heldout")
_NAME = re.compile(
    r"(?P<prefix>hf:(?://)?(?:datasets/)?)?(?P<repository>[A-Za-z0-9][\w.\-]*/[\w.\-]+)"
    r"(?:@(?P<revision>[\w.\-/]+))?(?::(?P<first>[\w.\-]+))?(?::(?P<second>[\w.\-]+))?"
)


@dataclass(frozen=True)
class HubData:
    """One split of a data set of the hub: `org/name`, `org/name@revision`, `org/name:split`."""

    repository: str
    revision: str | None = None
    split: str | None = None
    config: str | None = None

    @classmethod
    def parse(cls, text: str) -> Self | None:
        """What a name means; None for one that is a path. `org/name:config:split` names both."""
        match = _NAME.fullmatch(text)
        if match is None:
            return None
        repository = Path(match["repository"])
        if match["prefix"] is None and (
            repository.parent.is_dir() or plain_suffix(repository) in (*DATA_SUFFIXES, ".txt")
        ):
            return None
        config = match["first"] if match["second"] else None
        return cls(
            match["repository"], match["revision"], match["second"] or match["first"], config
        )

    def files(self) -> list[Path]:
        """The split's files on this machine, in order of their names.

        Raises `DataError` where there are none, or they cannot be fetched.
        """
        from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

        try:
            folder = self._snapshot(local_files_only=True)
            chosen = self._choose(folder, _listed(folder))
            if chosen:
                return [folder / name for name in chosen]
        except LocalEntryNotFoundError:
            pass
        except HFValidationError as error:
            raise DataError(
                f"{self.repository!r} is neither a path nor a hub id: {error}"
            ) from None
        try:
            return self._download()
        except EngineError:
            raise
        # The client, its transport and its storage have no common base of their errors.
        except Exception as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
            raise DataError(
                f"The data set {self.repository} is no path on this machine, is not whole in the "
                f"cache, and could not be downloaded ({reason}). Check the name and the network, "
                "or download it elsewhere and name its folder."
            ) from None

    def _download(self) -> list[Path]:
        import huggingface_hub

        names = huggingface_hub.HfApi().list_repo_files(
            self.repository, repo_type="dataset", revision=self.revision
        )
        readme = self._snapshot(allow_patterns=["README.md"])
        chosen = self._choose(readme, [name for name in names if _is_data(name)])
        if not chosen:
            listed = ", ".join(filter(_is_data, names)) or "none"
            raise DataError(
                f"{self.repository} has no data files of the split {self.split or TRAIN!r} "
                f"(data files: {listed[:300]}). Name a split: {self.repository}:SPLIT."
            )
        folder = self._snapshot(allow_patterns=chosen)
        return [folder / name for name in chosen]

    def _snapshot(self, **how: Any) -> Path:
        import huggingface_hub

        return Path(
            huggingface_hub.snapshot_download(
                self.repository, repo_type="dataset", revision=self.revision, **how
            )
        )

    def _choose(self, folder: Path, names: Sequence[str]) -> list[str]:
        """Of a repository's data files, those of the split."""
        configs = _front_matter(folder / "README.md").get("configs")
        patterns = self._patterns(configs) if isinstance(configs, list) else None
        if patterns is not None:
            return sorted(n for n in names if any(_matches(n, pattern) for pattern in patterns))
        if self.config is not None:
            names = [name for name in names if self.config in Path(name).parts[:-1]]
        return of_split(names, self.split or TRAIN, only=self.split is not None)

    def _patterns(self, configs: list[Any]) -> list[str] | None:
        """The file patterns that the README gives for the split; None where it gives none."""
        named = [item for item in configs if isinstance(item, dict) and "data_files" in item]
        wanted = [item for item in named if item.get("config_name") == self.config]
        if self.config is None:
            wanted = [i for i in named if i.get("default") or i.get("config_name") == "default"]
            wanted = wanted or named[:1]
        if not wanted:
            return None
        files = wanted[0]["data_files"]
        entries = files if isinstance(files, list) else [files]
        patterns: list[str] = []
        for entry in entries:
            if isinstance(entry, dict) and entry.get("split", TRAIN) == (self.split or TRAIN):
                path = entry.get("path", [])
                patterns += path if isinstance(path, list) else [path]
            elif isinstance(entry, str) and self.split in (None, TRAIN):
                patterns.append(entry)
        return patterns


def of_split(names: Sequence[str], split: str, only: bool = False) -> list[str]:
    """The files of a split by their names, or folders; for `train` those of no other split.

    `only` leaves out the second choice.
    """
    named = [name for name in names if _says(name, (split,))]
    if named or (only and split != TRAIN):
        return sorted(named)
    return sorted(name for name in names if not _says(name, (*OTHER_SPLITS, TRAIN)))


def _says(name: str, splits: Iterable[str]) -> bool:
    path = Path(name)
    words = {word for part in path.parent.parts for word in [part.lower()]}
    words |= set(re.split(r"[-_.]", path.name.lower())[:2])
    return any(split in words for split in splits)


def _matches(name: str, pattern: str) -> bool:
    return fnmatch.fnmatchcase(name, pattern.removeprefix("./").replace("**/", "*"))


def _listed(folder: Path) -> list[str]:
    return [str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file() and _is_data(p)]


def _is_data(name: str | Path) -> bool:
    path = Path(name)
    if path.name.lower() in ("readme.md", "license.txt", "license.md", "dataset_infos.json"):
        return False
    suffix = plain_suffix(path)
    return suffix in DATA_SUFFIXES or (
        suffix in TEXT_SUFFIXES and (path.suffix in COMPRESSED or suffix == ".txt")
    )


def _front_matter(readme: Path) -> dict[str, Any]:
    try:
        text = read_text(readme)
    except CheckpointError:
        return {}
    head = re.match(r"---\s*\n(.*?)\n---\s*(\n|$)", text, re.DOTALL)
    try:
        value = strict_yaml.load(head[1]) if head else None
    except yaml.YAMLError:
        return {}
    return value if isinstance(value, dict) else {}
