"""Resolve the name of a model to a path, downloading if needed.

A folder or file on this machine is used as it is, and the hub is never asked about it. A hub id is
looked up in the cache first, so that a model that was downloaded once loads without a network; only
what is not there is downloaded. Of a repository come configuration, tokenizer, templates and
safetensors files; pickles, other formats and original checkpoints stay where they are.
"""

from __future__ import annotations

import logging
import re
from pathlib import Path

from engine.errors import ConfigError
from engine.model_sources.gguf.parts import part_names
from engine.storage.safe_files import read_json_object

_ALLOWED = (
    "*.json",
    "*.safetensors",
    "*.jinja",
    "tokenizer.model",
    "merges.txt",
)
_IGNORED = (
    "original/*",
    "onnx/*",
    "consolidated*",
    "*.bin",
    "*.pt",
    "*.pth",
    "*.gguf",
)
_ADAPTER_CONFIG = "adapter_config.json"
_ADAPTER_WEIGHTS = "adapter_model.safetensors"
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")
_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.\-]*/[\w.\-]+")
_GGUF_IN_REPOSITORY = re.compile(r"([A-Za-z0-9][\w.\-]*/[\w.\-]+)/([\w.\-/]+\.gguf)")

log = logging.getLogger(__name__)


def resolve(model: str, revision: str | None = None, *, weights: bool = True) -> Path:
    """The folder or `.gguf` file that `model` names, downloading it if it has to be.

    `model` is a path, a hub id such as `org/name`, or a file of one, `org/name/file.gguf`;
    `revision` is a branch, tag or commit of the hub; without `weights` the small files are enough.
    Raises `ConfigError` where there is no such
    thing, or it cannot be reached.
    """
    path = Path(model).expanduser()
    if model and path.exists():
        return path
    file = _GGUF_IN_REPOSITORY.fullmatch(model)
    if file:
        folder, _, name = file[2].rpartition("/")
        parts = [f"{folder}/{part}" if folder else part for part in part_names(name)]
        fetched = {part: _fetch(file[1], revision, part) for part in parts}
        return fetched[file[2]]
    refuse_lost_run(model)
    if not is_hub_id(model) or path.suffix == ".gguf":
        raise ConfigError(
            f"There is no file or folder {model!r}, and it is not a hub id, which looks like "
            "organisation/name. Check the path."
        )
    return _fetch(model, revision, None, weights)


def fetch_config(repository: str, revision: str | None = None) -> Path:
    """The `config.json` of a hub id and nothing else of it. Raises `ConfigError`."""
    return _fetch(repository, revision, "config.json")


def is_hub_id(name: str) -> bool:
    """Whether `name` looks like organisation/name, and not like a path below a folder here."""
    return _REPOSITORY.fullmatch(name) is not None and not Path(name).parent.is_dir()


def fetch_adapter(repository: str) -> Path:
    """The folder with the adapter of a hub id, from the cache if it is there.

    Raises `ConfigError` where there is none, or it cannot be reached.
    """
    for name in (_ADAPTER_WEIGHTS, _ADAPTER_CONFIG):
        path = _fetch(repository, None, name)
    return path.parent


def _fetch(repository: str, revision: str | None, file: str | None, weights: bool = True) -> Path:
    """From the cache if it is complete there, else from the network."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    wanted = repository if revision is None else f"{repository} at {revision}"
    try:
        cached = _call(repository, revision, file, weights, local_files_only=True)
        if file is not None or _complete(cached, weights):
            return cached
        if weights and _complete(cached, weights, tokenizer=False):
            return _completed(repository, revision, cached)
    except LocalEntryNotFoundError:
        cached = None
    except HFValidationError as error:
        raise ConfigError(f"{repository!r} is neither a path nor a hub id: {error}.") from error
    try:
        return _call(repository, revision, file, weights, local_files_only=False)
    except (HfHubHTTPError, OSError, ValueError) as error:
        state = "is not in the cache" if cached is None else "is only partly in the cache"
        raise ConfigError(
            f"The model {wanted!r} is no path on this machine, {state}, and could not be "
            f"downloaded ({_reason(error)}). Check the name and the network, or download it "
            "elsewhere and name its folder."
        ) from error


def refuse_lost_run(name: str) -> None:
    """Raise `ConfigError` where a name is that of a missing run beside others, and no hub id."""
    folder = Path(name).parent
    runs = sorted(path.parent.name for path in folder.glob("*/manifest.json"))
    if runs:
        raise ConfigError(
            f"There is no {name}. {folder}/ holds the runs {', '.join(runs[-8:])}. Check the name."
        )


def _completed(repository: str, revision: str | None, cached: Path) -> Path:
    """A cached model that lacks only its tokenizer, fetched again if the hub can be reached."""
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return _call(repository, revision, None, True, local_files_only=False)
    except (HfHubHTTPError, OSError, ValueError) as error:
        log.warning(
            "%s has no tokenizer in the cache, and the hub cannot be asked for it (%s)",
            repository, _reason(error),
        )  # fmt: skip
        return cached


def _reason(error: Exception) -> str:
    """The first line of what `error` says, or its name where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def _call(
    repository: str,
    revision: str | None,
    file: str | None,
    weights: bool,
    *,
    local_files_only: bool,
) -> Path:
    import huggingface_hub

    if file is not None:
        return Path(
            huggingface_hub.hf_hub_download(
                repository, file, revision=revision, local_files_only=local_files_only
            )
        )
    return Path(
        huggingface_hub.snapshot_download(
            repository,
            revision=revision,
            allow_patterns=list(_ALLOWED),
            ignore_patterns=[*_IGNORED, *([] if weights else ["*.safetensors"])],
            local_files_only=local_files_only,
        )
    )


def _complete(folder: Path, weights: bool, *, tokenizer: bool = True) -> bool:
    """Whether a snapshot in the cache holds a configuration, a tokenizer and all weight files.

    Without `weights` or `tokenizer`, whether it holds the rest.
    """
    if not (folder / "config.json").exists():
        return False
    if tokenizer and not any((folder / name).exists() for name in _TOKENIZERS):
        return False
    if not weights:
        return True
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        return (folder / "model.safetensors").exists()
    shards = read_json_object(index).get("weight_map")
    return isinstance(shards, dict) and all(
        (folder / str(shard)).exists() for shard in set(map(str, shards.values()))
    )
