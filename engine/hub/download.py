"""Files of the hub: from the cache, else downloaded.

The cache is huggingface_hub's own, `models--org--name/{refs,snapshots}`, so what other programs
fetched is used, and the other way round. A download asks once which files a revision has, takes
those that are needed, small files first, and all of one commit: a snapshot that holds its weights
holds the rest as well.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from engine.errors import ConfigError
from engine.hub.failures import explained
from engine.hub.names import HubName
from engine.storage.home import expanded
from engine.storage.safe_files import MIB, read_json_object

_TIMEOUT = 10.0
"""Seconds that the hub has to answer what files there are."""

log = logging.getLogger(__name__)


def cached_snapshot(name: HubName) -> Path | None:
    """The folder of the cache with the files of a revision, whole or not. Asks no network."""
    from huggingface_hub import constants

    folder = expanded(constants.HF_HUB_CACHE)
    folder /= f"{name.kind}s--{name.repository.replace('/', '--')}"
    revision = name.revision or constants.DEFAULT_REVISION
    reference = folder / "refs" / revision
    commit = reference.read_text().strip() if reference.is_file() else revision
    snapshot = folder / "snapshots" / commit
    return snapshot if snapshot.is_dir() else None


class RemoteFiles:
    """The files of one commit of a repository, as the hub lists them."""

    def __init__(self, name: HubName) -> None:
        from huggingface_hub import HfApi

        self.name = name
        ask = HfApi().dataset_info if name.kind == "dataset" else HfApi().model_info
        info = ask(name.repository, revision=name.revision, files_metadata=True, timeout=_TIMEOUT)
        self._commit = str(info.sha)
        self._sizes = {file.rfilename: file.size or 0 for file in info.siblings or []}

    def __contains__(self, file: str) -> bool:
        return file in self._sizes

    def names(self) -> list[str]:
        """All files, by their paths in the repository."""
        return list(self._sizes)

    def read_json(self, file: str) -> dict[str, Any]:
        """A small JSON file, downloaded first if it has to be."""
        return read_json_object(self._fetch(file), limit=32 * MIB)

    def fetch(self, files: Iterable[str]) -> Path:
        """The folder of the cache that holds `files`, of which the missing are downloaded.

        Raises `ConfigError` where the disk has no room for them.
        """
        wanted = sorted(files, key=self._size)
        local = cached_snapshot(HubName(self.name.repository, self._commit, kind=self.name.kind))
        missing = [file for file in wanted if local is None or not (local / file).exists()]
        total = sum(map(self._size, missing))
        _require_space(self.name, total)
        if missing:
            log.info("%s: %d files, %.1f MB to download", self.name, len(missing), total / 1e6)
        # The first by the revision's own name, so that the cache knows which commit it means.
        self._fetch(wanted[0], self.name.revision or "main")
        paths = [self._fetch(file) for file in wanted]
        depth = wanted[-1].count("/")
        return paths[-1].parents[depth]

    def _size(self, file: str) -> int:
        return self._sizes.get(file, 0)

    def _fetch(self, file: str, revision: str | None = None) -> Path:
        from huggingface_hub import hf_hub_download

        path = hf_hub_download(
            self.name.repository,
            file,
            repo_type=self.name.kind,
            revision=revision or self._commit,
        )
        return Path(path)


def download(name: HubName, choose: Callable[[RemoteFiles], Iterable[str]]) -> Path:
    """The folder of the cache with the files that `choose` takes of a repository.

    Raises `ConfigError`, with the command that fetches it elsewhere, where the network is switched
    off or does not answer, the hub refuses, or the disk has no room.
    """
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        raise ConfigError(
            f"{str(name)!r} is no path on this machine and is not wholly in the cache "
            f"{constants.HF_HUB_CACHE}, and HF_HUB_OFFLINE forbids to ask for it. Fetch it where "
            f"there is a network, and it is used from the cache: {name.command()}"
        )
    with explained(name):
        remote = RemoteFiles(name)
        return remote.fetch(choose(remote))


def _require_space(name: HubName, size: int) -> None:
    from huggingface_hub import constants

    cache = expanded(constants.HF_HUB_CACHE)
    folder = next(parent for parent in (cache, *cache.absolute().parents) if parent.is_dir())
    free = shutil.disk_usage(folder).free
    if free < size:
        raise ConfigError(
            f"Downloading {name} takes {size / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free in "
            f"{cache}. Make room, or name a folder on another disk in HF_HOME."
        )
