"""Open a pretrained model: directory, GGUF file or hub id."""

from __future__ import annotations

from pathlib import Path

from engine.errors import CheckpointError, ConfigError
from engine.model_sources.gguf.parts import lone_model
from engine.model_sources.gguf.source import GGUFSource
from engine.model_sources.hf_directory import HFDirectory
from engine.model_sources.hub import resolve
from engine.model_sources.interface.model_source import ModelDescription, ModelSource
from engine.model_sources.model_files import ModelFiles
from engine.model_sources.pruning_record import masked
from engine.storage.safe_files import (
    STAND_IN_BYTES,
    is_pickle,
    read_head,
    refuse_pickle,
    refuse_stand_in,
)


def open_model_source(model: str | Path, revision: str | None = None) -> ModelSource:
    """Open a Hugging Face directory, a `.gguf` file or a model of the hub by its id.

    Attention heads that the `pruning.json` of a model masks read as zeros. Raises
    `ConfigError` where nothing is found or the configuration cannot be used, and `CheckpointError`
    where the files are damaged or do not match the configuration.
    """
    path = resolve(str(model), revision)
    if not path.is_dir():
        _refuse_other_files(path)
        return GGUFSource(path)
    lone = None if (path / "config.json").exists() else lone_model(path)
    if lone is not None:
        return GGUFSource(lone)
    return masked(HFDirectory(path))


def describe_model(model: str | Path, revision: str | None = None) -> ModelDescription:
    """Configuration, tokenizer and templates of a model, without its weights.

    Of a hub id only the small files are downloaded; of a GGUF file, which is one with its weights,
    the header is read. Raises as `open_model_source` does.
    """
    path = resolve(str(model), revision, weights=False)
    if path.is_dir() and (path / "config.json").exists():
        return ModelFiles(path)
    return open_model_source(path)


def _refuse_other_files(path: Path) -> None:
    if read_head(path, 4) == b"GGUF":
        return
    if is_pickle(path):
        refuse_pickle(path)
    refuse_stand_in(read_head(path, STAND_IN_BYTES), str(path))
    if path.suffix == ".gguf":
        raise CheckpointError(f"{path} does not start with the letters GGUF; download it again.")
    raise ConfigError(
        f"{path} is a single file, and no GGUF file. Name the folder that holds the model's "
        "config.json and safetensors files."
    )
