"""`Checkpoint`: what every source of a pretrained model offers, and how one is opened.

A source is a Hugging Face directory or a GGUF file. Whatever it is, its tensors carry Hugging
Face's names and layout, its configuration is that of `config.json` in transformers 5 spelling, and
its tokenizer is a `tokenizers` JSON or a SentencePiece file.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch

from engine.errors import CheckpointError, ConfigError
from engine.storage.safe_files import MIB, is_pickle, open_regular, read_head, refuse_pickle
from models.config.model_config import ModelConfig

_LISTED = 16


class Checkpoint(Protocol):
    """A pretrained model on disk. Tensors are read one at a time, on the CPU."""

    @property
    def path(self) -> Path:
        """The folder or file that was opened."""

    @property
    def config(self) -> ModelConfig:
        """Shape and arithmetic of the model."""

    @property
    def raw_config(self) -> dict[str, Any]:
        """The parsed config.json, or what it would hold."""

    @property
    def generation_config(self) -> dict[str, Any]:
        """The parsed generation_config.json, or what it would hold; empty where unknown."""

    def names(self) -> list[str]:
        """Names of the tensors: those that `models.tensor_names.expected_tensors` lists for the
        file's layout, then those of other parts (`models.tensor_layout.carried_prefixes`)."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of tensor `name`."""

    def dtype(self, name: str) -> torch.dtype:
        """Type that `tensor(name)` has; float32 for a tensor that is stored quantised."""

    def tensor(self, name: str) -> torch.Tensor:
        """Tensor `name`, on the CPU. It may be a view of a mapped file: copy it to keep it."""

    def release(self, name: str) -> None:
        """Say that no view of tensor `name` is in use, so that its pages can leave memory."""

    def tokenizer_json(self) -> str | None:
        """The serialised `tokenizers` tokenizer, or None where the source has none."""

    def tokenizer_model(self) -> Path | None:
        """The SentencePiece file, or None where the source has none."""

    def tokenizer_config(self) -> dict[str, Any]:
        """`tokenizer_config.json`, empty where there is none."""

    def chat_template(self) -> str | None:
        """The Jinja text of the default chat template, or None where the source has none."""

    def tokenizer_files(self) -> dict[str, bytes | Path]:
        """Relative name -> content of every file to put beside a model saved from this one."""

    def digest(self) -> str:
        """SHA-256 in hexadecimal that tells this model from another; see `quick_digest`."""


def open_checkpoint(model: str | Path, revision: str | None = None) -> Checkpoint:
    """Open a Hugging Face directory, a `.gguf` file or a model of the hub by its id.

    Attention heads that a `pruning.json` beside the weights masks read as zeros. Raises
    `ConfigError` where nothing is found or the configuration cannot be used, and `CheckpointError`
    where the files are damaged or do not match the configuration.
    """
    from engine.model_sources.gguf.source import GGUFCheckpoint
    from engine.model_sources.hf_directory import HFDirectory
    from engine.model_sources.hub import resolve
    from engine.model_sources.pruning_record import masked

    path = resolve(str(model), revision)
    if not path.is_dir():
        _refuse_other_files(path)
        return GGUFCheckpoint(path)
    lone = sorted(path.glob("*.gguf"))
    if len(lone) == 1 and not (path / "config.json").exists():
        return GGUFCheckpoint(lone[0])
    return masked(HFDirectory(path))


def match_tensors(
    found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]], source: str
) -> None:
    """Raise a `CheckpointError` that lists every missing, surplus or misshapen tensor."""
    missing = [f"{name} {list(expected[name])}" for name in expected if name not in found]
    surplus = [f"{name} {list(found[name])}" for name in found if name not in expected]
    wrong = [
        f"{name} is {list(found[name])}, expected {list(expected[name])}"
        for name in expected
        if name in found and tuple(found[name]) != tuple(expected[name])
    ]
    if missing or surplus or wrong:
        parts = [
            f"{len(items)} {kind}: {listing(items)}"
            for kind, items in (
                ("missing", missing),
                ("not in such a model", surplus),
                ("of the wrong shape", wrong),
            )
            if items
        ]
        raise CheckpointError(
            f"The tensors in {source} are not those of the model its configuration describes. "
            f"{'. '.join(parts)}. The configuration belongs to another model, or files are missing."
        )


def listing(items: Iterable[str]) -> str:
    """`items` in one line, cut after a few with the number of those left out."""
    names = list(items)
    rest = f", and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + rest


def quick_digest(config: Mapping[str, Any], files: Iterable[Path]) -> str:
    """SHA-256 over `config` and, for each file, its name, size, first and last MiB.

    It reads two MiB of a file whatever its size, so it can run at every start: it tells one model,
    or one download, from another, and does not find a flipped bit in the middle.
    """
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for path in files:
        with os.fdopen(open_regular(path), "rb") as handle:
            size = os.fstat(handle.fileno()).st_size
            digest.update(f"\0{path.name}\0{size}\0".encode())
            digest.update(handle.read(MIB))
            handle.seek(max(size - MIB, 0))
            digest.update(handle.read(MIB))
    return digest.hexdigest()


def _refuse_other_files(path: Path) -> None:
    if read_head(path, 4) == b"GGUF":
        return
    if is_pickle(path):
        refuse_pickle(path)
    if path.suffix == ".gguf":
        raise CheckpointError(f"{path} does not start with the letters GGUF; download it again.")
    raise ConfigError(
        f"{path} is a single file, and no GGUF file. Name the folder that holds the model's "
        "config.json and safetensors files."
    )
