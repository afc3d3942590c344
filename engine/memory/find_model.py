"""Find the model to plan for, without its weights.

It is named by a preset, a folder, a file or a hub id.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from engine.errors import ConfigError, EngineError
from engine.hub.names import hub_name
from engine.memory.model_shapes import preset_config, unknown_model
from engine.model_sources.hub import fetch_config, resolve
from engine.model_sources.interface.checks import read_config
from engine.model_sources.interface.model_source import ModelSource
from engine.model_sources.open import open_model_source
from engine.storage.home import expanded
from engine.storage.safe_files import read_json_object
from models.config.model_config import ModelConfig

_STORED = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def find_model(model: str, revision: str | None = None) -> tuple[ModelConfig, torch.dtype]:
    """Shape of a model and the type its files hold. Raises `ConfigError` where there is none.

    A path wins over a preset of the same name, and a preset over a hub id.
    """
    path = expanded(model)
    if not path.exists():
        preset = preset_config(model)
        if preset is not None:
            return preset, torch.bfloat16
        name = hub_name(model, revision)
        if name is None or (path.suffix == ".gguf" and name.file is None):
            raise unknown_model(model)
        path = fetch_config(name) if name.file is None else resolve(model, revision)
    if path.suffix == ".gguf" or (path.is_dir() and not (path / "config.json").is_file()):
        return open_model_source(path).config, torch.float32
    file = path / "config.json" if path.is_dir() else path
    raw = read_json_object(file, ConfigError)
    stored = raw.get("dtype") or raw.get("torch_dtype") or "bfloat16"
    return read_config(raw, str(file)), _STORED.get(str(stored), torch.bfloat16)


def noted_quantisation(model: str, revision: str | None = None) -> Mapping[str, Any]:
    """What config.json of a model says of quantised weights; empty where it says nothing."""
    path = expanded(model)
    if not path.exists():
        name = hub_name(model, revision)
        if preset_config(model) is not None or name is None or name.file is not None:
            return {}
        path = fetch_config(name)
    file = path / "config.json" if path.is_dir() else path
    if file.name != "config.json" or not file.is_file():
        return {}
    noted = read_json_object(file, ConfigError).get("quantization_config")
    return noted if isinstance(noted, Mapping) else {}


def quantised_files(model: str) -> ModelSource | None:
    """The model with its weights, where they are at hand and quantised; only headers are read.

    None too where they cannot be read, which whoever loads them is told.
    """
    path = expanded(model)
    if not path.exists() or not (path.is_dir() or path.suffix == ".gguf"):
        return None
    try:
        source = open_model_source(path)
    except EngineError:
        return None
    return source if any(map(source.stored_as, source.names())) else None


def stored_in_nf4(noted: Mapping[str, Any]) -> bool:
    """Whether a quantisation that config.json notes is bitsandbytes' NF4."""
    return bool(noted.get("load_in_4bit")) and noted.get("bnb_4bit_quant_type") == "nf4"
