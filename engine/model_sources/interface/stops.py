"""Token ids that end an answer, from files and from training.

A run may teach another end than the model had: a base model that ends at `<|endoftext|>`, trained
with a ChatML template, ends its answers with `<|im_end|>`. Whatever such a run leaves behind lists
both in generation_config.json, where transformers, vLLM and this engine read them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from engine.errors import CheckpointError, printable
from engine.model_sources.interface.model_source import ModelDescription
from engine.storage.safe_files import read_json_object
from models.families.json_values import token_ids

GENERATION_CONFIG = "generation_config.json"
_EOS = "eos_token_id"
_LONGEST = 1000


def stops_of(source: ModelDescription) -> tuple[int, ...]:
    """The ids that end an answer, by generation_config.json and then config.json of the model."""
    named = listed_stops(source.generation_config, source.path / GENERATION_CONFIG)
    return _once(named, source.config.eos_token_id)


def listed_stops(generation_config: Mapping[str, Any], path: Path) -> tuple[int, ...]:
    """The ids that end an answer, by the parsed generation_config.json of `path` alone.

    Raises `CheckpointError` for what are no ids: an answer would not end where it should.
    """
    try:
        return token_ids(generation_config, _EOS)
    except ValueError as error:
        raise CheckpointError(f"{path}: {printable(str(error), _LONGEST)}.") from error


def adapter_stops(directory: Path) -> tuple[int, ...]:
    """The ids that end an answer, by the generation_config.json of an adapter; none without it."""
    path = directory / GENERATION_CONFIG
    return listed_stops(read_json_object(path), path) if path.is_file() else ()


def with_stops(source: ModelDescription, stops: Iterable[int]) -> dict[str, Any]:
    """The generation_config.json of a model that was taught to end its answers with `stops`.

    That of `source`, unless an id is new to it. Ids that the model had stay.
    """
    present = dict(source.generation_config)
    before = stops_of(source)
    listed = _once(before, stops)
    if listed == before:
        return present
    if not present:  # where there is a file, transformers asks config.json no more
        ids = {"bos_token_id": source.config.bos_token_id, "pad_token_id": _pad(source.raw_config)}
        present = {name: index for name, index in ids.items() if index is not None}
    return present | {_EOS: list(listed) if len(listed) > 1 else listed[0]}


def _pad(raw_config: Mapping[str, Any]) -> int | None:
    value = raw_config.get("pad_token_id")
    return value if isinstance(value, int) else None


def _once(*groups: Iterable[int]) -> tuple[int, ...]:
    return tuple(dict.fromkeys(index for group in groups for index in group))
