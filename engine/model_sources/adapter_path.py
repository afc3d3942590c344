"""Read the adapter of a folder, run, GGUF file or hub id."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from engine.config.given_adapters import weighted_paths
from engine.errors import CheckpointError, ConfigError
from engine.hub.names import hub_name
from engine.model_sources.adapter.gguf_lora import load_gguf_adapter
from engine.model_sources.adapter.peft import CONFIG, Adapter, load_adapter
from engine.model_sources.hub import fetch_adapter, refuse_lost_run
from engine.model_sources.weighted_adapters import weighted_sum
from engine.storage.home import expanded
from models.config.model_config import ModelConfig

_IN_RUN = "adapter"


def adapter_path(name: Path | str) -> Path:
    """The folder or GGUF file of the adapter that `name` means.

    A run's directory means its `adapter/`, and a file of an adapter's folder that folder; what is
    no path may be a hub id, which is looked up in the cache first. Raises `CheckpointError` for a
    path that holds no adapter, and `ConfigError` for what is neither.
    """
    path = expanded(name)
    if path.is_file() and path.suffix != ".gguf" and (path.parent / CONFIG).exists():
        path = path.parent
    if path.is_file() or (path / CONFIG).exists():
        return path
    if (path / _IN_RUN / CONFIG).exists():
        return path / _IN_RUN
    if path.is_dir():
        raise CheckpointError(f"{path} holds no {CONFIG}{_instead(path)}")
    refuse_lost_run(str(name))
    remote = hub_name(str(name))
    if remote is not None and remote.file is None:
        return fetch_adapter(remote)
    raise ConfigError(
        f"There is no adapter {str(name)!r}: no such folder, and it is not a hub id, which looks "
        "like organisation/name. Check the path."
    )


def open_adapter(name: Path | str) -> Adapter:
    """Read the adapter that `name` means, in PEFT's or llama.cpp's format. Raises as above."""
    path = adapter_path(name)
    return load_gguf_adapter(path) if path.is_file() else load_adapter(path)


def open_adapters(given: Any, model: ModelConfig, name: Path | str) -> Adapter:
    """The adapter for `model`, called `name`, that `given` means: one, or the sum of several.

    `given` is what settings take: a path, `path=weight`, a pair of both, or several of these.
    Raises as above, and `ConfigError` where they cannot be added up.
    """
    try:
        listed = weighted_paths(given)
    except ValueError as error:
        raise ConfigError(f"adapter is {given!r}: {error}.") from error
    return weighted_sum([(open_adapter(path), weight) for path, weight in listed], model, str(name))


def _instead(path: Path) -> str:
    """What the folder holds in place of an adapter, and what to do."""
    if (path / "model" / "config.json").exists():
        return (
            ": it is the directory of a run that trained all weights. Give its model folder as "
            f"--model {path / 'model'} instead."
        )
    if (path / "config.json").exists() and not (path / "manifest.json").exists():
        return ": it is a model, not an adapter. Give it as --model."
    if (path / "manifest.json").exists():
        return (
            ", nor does its folder adapter: this run has not saved one yet. Let it finish: engine "
            f"resume {path}"
        )
    if (path / "state.json").exists():
        result = path.parent / _IN_RUN
        given = f"Give --adapter {result}, or" if (result / CONFIG).exists() else "To have one,"
        return f": it is a checkpoint. {given} go on with its run: engine resume {path.parent}"
    runs = sorted(folder.parent.parent for folder in path.glob(f"*/{_IN_RUN}/{CONFIG}"))
    if runs:
        return f", but the runs {', '.join(map(str, runs[:4]))} do: name one of them."
    inner = sorted(folder.parent for folder in path.glob(f"*/{CONFIG}"))
    if inner:
        return f", but {', '.join(map(str, inner[:4]))} do: name one of them."
    return ", so it is not a LoRA adapter. Name the folder that the adapter was saved to."
