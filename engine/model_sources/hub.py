"""Models and adapters of the hub: which files are needed.

A folder or file on this machine is used as it is, and the hub is never asked about it. A hub id is
looked up in the cache first, so that a model that was downloaded once loads without a network; only
what is not there is downloaded. Of a repository come configuration, tokenizer, templates and the
safetensors files; pickles, other formats and original checkpoints stay where they are.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable
from pathlib import Path

from engine.errors import ConfigError, listing
from engine.hub.download import RemoteFiles, cached_snapshot, download
from engine.hub.names import HubName, hub_name
from engine.model_sources.gguf.parts import part_names
from engine.model_sources.vocabulary.folder import TOKENIZER_FILES
from engine.storage.home import expanded
from engine.storage.safe_files import MIB, read_json_object

_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"
_CONFIG = "config.json"
_SMALL = (*TOKENIZER_FILES, "generation_config.json", "pruning.json")
_TEMPLATE = re.compile(r"additional_chat_templates/[\w.\-]+\.jinja")
_ADAPTER = ("adapter_config.json", "adapter_model.safetensors")
_BESIDE_ADAPTER = ("base.json",)
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")
_PICKLE = re.compile(r"[^/]+\.(bin|pt|pth|ckpt)")

log = logging.getLogger(__name__)


def resolve(model: str, revision: str | None = None, *, weights: bool = True) -> Path:
    """The folder or `.gguf` file that `model` names, downloading it if it has to be.

    `model` is a path, which may be that of a run that trained every weight, a hub id such as
    `org/name`, or a file of one, `org/name/file.gguf`, both also as `org/name@revision`; `revision`
    is a branch, tag or commit of the hub; without `weights` the small files are enough. Raises
    `ConfigError` where there is no such thing, or it cannot be reached.
    """
    path = expanded(model)
    if model and path.exists():
        return _whole_model(path)
    refuse_lost_run(model)
    name = hub_name(model, revision)
    if name is None or (path.suffix == ".gguf" and name.file is None):
        raise ConfigError(
            f"There is no file or folder {model!r}, and it is not a hub id, which looks like "
            "organisation/name. Check the path."
        )
    if name.file is not None:
        return _gguf_file(name, name.file)
    cached = cached_snapshot(name)
    if cached is not None and _complete(cached, weights):
        return cached
    if cached is not None and weights and _complete(cached, weights, tokenizer=False):
        return _completed(name, cached)
    return download(name, _model_files if weights else _small_files)


def _whole_model(path: Path) -> Path:
    """The model of a run that trained every weight, where `path` is the run; else `path`."""
    inner = path / "model"
    is_run = path.is_dir() and not (path / _CONFIG).exists() and (path / "manifest.json").is_file()
    return inner if is_run and (inner / _CONFIG).is_file() else path


def fetch_config(name: HubName) -> Path:
    """The `config.json` of a hub id and nothing else of it. Raises `ConfigError`."""
    return _files(name, lambda remote: [_required(remote, _CONFIG)], (_CONFIG,)) / _CONFIG


def fetch_adapter(name: HubName) -> Path:
    """The folder with the adapter of a hub id, from the cache if it is there.

    Raises `ConfigError` where there is none, or it cannot be reached.
    """
    return _files(name, _adapter_files, _ADAPTER)


def refuse_lost_run(name: str) -> None:
    """Raise `ConfigError` where a name is that of a missing run beside others, and no hub id."""
    folder = Path(name).parent
    runs = sorted(path.parent.name for path in folder.glob("*/manifest.json"))
    if runs:
        raise ConfigError(
            f"There is no {name}. {folder}/ holds the runs {', '.join(runs[-8:])}. Check the name."
        )


def _files(
    name: HubName, choose: Callable[[RemoteFiles], Iterable[str]], needed: Iterable[str]
) -> Path:
    """A folder of the cache with the `needed` files, downloaded if one of them is missing."""
    cached = cached_snapshot(name)
    if cached is not None and all((cached / file).exists() for file in needed):
        return cached
    return download(name, choose)


def _gguf_file(name: HubName, file: str) -> Path:
    """A GGUF file of a repository, with its other parts where it is one of several."""
    folder, _, last = file.rpartition("/")
    parts = [f"{folder}/{part}" if folder else part for part in part_names(last)]
    return _files(name, lambda remote: [_required(remote, part) for part in parts], parts) / file


def _completed(name: HubName, cached: Path) -> Path:
    """A cached model that lacks only its tokenizer, fetched again if the hub can be reached."""
    try:
        return download(name, _model_files)
    except ConfigError as error:
        log.warning("%s has no tokenizer in the cache: %s", name, error)
        return cached


def _model_files(remote: RemoteFiles) -> list[str]:
    """The files of a model: configuration, tokenizer, templates and one set of weights."""
    small = _small_files(remote)
    if _WEIGHTS in remote:
        return [*small, _WEIGHTS]
    if _INDEX in remote:
        shards = remote.read_json(_INDEX).get("weight_map")
        if isinstance(shards, dict) and shards:
            return [*small, _INDEX, *(_required(remote, str(s)) for s in set(shards.values()))]
    pickles = [file for file in remote.names() if _PICKLE.fullmatch(file)]
    if pickles:
        raise ConfigError(
            f"{remote.name} holds its weights as pickles only ({listing(pickles)}), which can run "
            "code and are not read. Take a repository or a revision with safetensors files: a pull "
            f"request of the hub's converter is named {remote.name.repository}@refs/pr/NUMBER."
        )
    raise ConfigError(
        f"{remote.name} holds neither {_WEIGHTS} nor {_INDEX}{_holds(remote)}. Name a repository "
        "with a model's safetensors files."
    )


def _small_files(remote: RemoteFiles) -> list[str]:
    """The files of a model but its weights. Raises `ConfigError` for what is no model."""
    if _CONFIG not in remote:
        if _ADAPTER[0] in remote:
            raise ConfigError(f"{remote.name} is an adapter, not a model. Give it as --adapter.")
        ggufs = [file for file in remote.names() if file.endswith(".gguf")]
        if ggufs:
            raise ConfigError(
                f"{remote.name} holds GGUF files: name one of them, as "
                f"{remote.name}/{ggufs[0]}. It has {listing(ggufs)}."
            )
        raise ConfigError(f"{remote.name} holds no {_CONFIG}{_holds(remote)}: it is no model.")
    small = [file for file in _SMALL if file in remote]
    return [_CONFIG, *small, *filter(_TEMPLATE.fullmatch, remote.names())]


def _adapter_files(remote: RemoteFiles) -> list[str]:
    """The files of an adapter: its configuration and weights, and what is known of its base."""
    if _ADAPTER[0] not in remote and _CONFIG in remote:
        raise ConfigError(f"{remote.name} is a model, not an adapter. Give it as --model.")
    if _ADAPTER[0] in remote and _ADAPTER[1] not in remote and "adapter_model.bin" in remote:
        raise ConfigError(
            f"{remote.name} holds its adapter as a pickle (adapter_model.bin), which can run code "
            "and is not read. Load it with PEFT and save it again, which writes safetensors."
        )
    needed = [_required(remote, file) for file in _ADAPTER]
    return [*needed, *(file for file in (*_SMALL, *_BESIDE_ADAPTER) if file in remote)]


def _required(remote: RemoteFiles, file: str) -> str:
    if file not in remote:
        raise ConfigError(f"{remote.name} has no file {file}{_holds(remote)}.")
    return file


def _holds(remote: RemoteFiles) -> str:
    return f"; it holds {listing(remote.names()) or 'nothing'}"


def _complete(folder: Path, weights: bool, *, tokenizer: bool = True) -> bool:
    """Whether a snapshot in the cache holds a configuration, a tokenizer and all weight files.

    Without `weights` or `tokenizer`, whether it holds the rest.
    """
    if not (folder / _CONFIG).exists():
        return False
    if tokenizer and not any((folder / name).exists() for name in _TOKENIZERS):
        return False
    if not weights or (folder / _WEIGHTS).exists():
        return True
    if not (folder / _INDEX).exists():
        return False
    shards = read_json_object(folder / _INDEX, limit=32 * MIB).get("weight_map")
    return isinstance(shards, dict) and all(
        (folder / str(shard)).exists() for shard in set(map(str, shards.values()))
    )
