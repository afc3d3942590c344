"""`GGUFSource`: the model in a GGUF file or its parts.

Tensors get Hugging Face's names, and are dequantised one at a time when they are asked for. F32,
F16, BF16, Q8_0, Q4_0 and Q4_1 are unpacked here; every other type through the `gguf` package.

What llama.cpp's converter changed is undone, as `engine.model_sources.gguf.tensor_map` says. Layers
that predict further tokens are left out.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from functools import cached_property, reduce
from pathlib import Path
from typing import Any

import numpy as np
import torch

from engine.errors import CheckpointError, ConfigError
from engine.model_sources.gguf.config import raw_config
from engine.model_sources.gguf.container import GGUFFile
from engine.model_sources.gguf.parts import GGUFParts
from engine.model_sources.gguf.sampling import sampling
from engine.model_sources.gguf.tensor_map import sources
from engine.model_sources.gguf.tokenizer import GGUFTokenizer, build_tokenizer
from engine.model_sources.interface.checks import match_tensors, quick_digest, read_config
from engine.model_sources.interface.model_source import ModelSource
from engine.model_sources.interface.row_parts import outside_layers, rows_of_part, split_rows
from models.tensor_names import expected_tensors

_STORED = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_ROPE_FREQS = "rope_freqs.weight"
_BLOCK = re.compile(r"blk\.(\d+)\..+")


class GGUFSource:
    """The model in `path`, a whole file or any of its parts; see `ModelSource` for its methods.

    Raises `CheckpointError` for a damaged file or one whose tensors do not match its metadata, and
    `ConfigError` for a model of a kind that is not supported.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self._file = GGUFParts(self.path)
        shapes = {name: info.shape for name, info in self._file.tensors.items()}
        rope_freqs = None
        if _ROPE_FREQS in shapes:
            rope_freqs = dequantise(self._file, _ROPE_FREQS)
            del shapes[_ROPE_FREQS]
        self.raw_config = raw_config(self._file.metadata, shapes, rope_freqs, str(self.path))
        self.config = read_config(self.raw_config, str(self.path))
        shapes = self._without_prediction(shapes)
        self._shapes, self._sources = expected_tensors(self.config), sources(self.config, shapes)
        parts = (source.tensors for source in self._sources.values())
        match_tensors(shapes, {n: s for part in parts for n, s in part.items()}, str(self.path))
        self.raw_config["dtype"] = str(self.dtype("model.embed_tokens.weight")).split(".")[-1]

    @property
    def quantised(self) -> bool:
        """Whether any tensor is stored in fewer than 16 bits a number."""
        return any(info.kind not in _STORED for info in self._file.tensors.values())

    @property
    def generation_config(self) -> dict[str, Any]:
        """What generation_config.json would hold: ids that start, end and pad a text, sampling."""
        ids = self._tokenizer.generation_config if self._tokenizer else {}
        return ids | sampling(self._file.metadata)

    def names(self) -> list[str]:
        return list(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        self._check(name)
        return self._shapes[name]

    def dtype(self, name: str) -> torch.dtype:
        self._check(name)
        kinds = (self._file.tensors[part].kind for part in self._sources[name].tensors)
        return reduce(torch.promote_types, (_STORED.get(kind, torch.float32) for kind in kinds))

    def tensor(self, name: str) -> torch.Tensor:
        self._check(name)
        source = self._sources[name]
        parts = [dequantise(self._file, part, source.entry) for part in source.tensors]
        return source.restore(*parts)

    def row_parts(self, name: str) -> Iterator[torch.Tensor]:
        """Tensor `name` in parts; embedding and head are dequantised some rows at a time."""
        shape, stored = self.shape(name), list(self._sources[name].tensors)
        if len(shape) != 2 or not outside_layers(name):
            yield from split_rows(self.tensor(name))
            return
        step = rows_of_part(shape)
        for start in range(0, shape[0], step):
            yield dequantise(self._file, stored[0], slice(start, start + step)).view(-1, shape[1])

    def codes(self, name: str) -> None:
        """None: the kernels compute with other codes than those of GGUF files."""
        self._check(name)

    def stored_as(self, name: str) -> str | None:
        self._check(name)
        kinds = {self._file.tensors[part].kind for part in self._sources[name].tensors}
        return " and ".join(sorted(kinds - _STORED.keys())) or None

    def release(self, name: str) -> None:
        """Nothing to do: `tensor` returns memory of its own, and drops the pages it read."""
        self._check(name)

    def tokenizer_json(self) -> str | None:
        return self._tokenizer.json if self._tokenizer else None

    def tokenizer_model(self) -> Path | None:
        """None: the pieces of a SentencePiece model are in the metadata, not its file."""
        return None

    def tokenizer_config(self) -> dict[str, Any]:
        return self._tokenizer.config if self._tokenizer else {}

    def chat_template(self, name: str = "default") -> str | None:
        suffix = "" if name == "default" else f".{name}"
        template = self._file.metadata.get(f"tokenizer.chat_template{suffix}")
        return template if isinstance(template, str) else None

    def tokenizer_files(self) -> dict[str, bytes]:
        return dict(self._tokenizer.files(self.chat_template())) if self._tokenizer else {}

    def digest(self) -> str:
        return quick_digest(self.raw_config, self._file.paths)

    @cached_property
    def _tokenizer(self) -> GGUFTokenizer | None:
        return build_tokenizer(
            self._file.metadata,
            self.config.vocab_size,
            str(self.path),
            self.path.with_name("tokenizer.json"),
        )

    def _without_prediction(self, shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
        """`shapes` less those of the layers that predict further tokens, which nothing here runs.

        They are numbered on after the decoder's own.
        """
        architecture = self._file.metadata["general.architecture"]
        further = self._file.metadata.get(f"{architecture}.nextn_predict_layers", 0)
        first = self.config.num_hidden_layers
        return {
            name: shape
            for name, shape in shapes.items()
            if not (match := _BLOCK.fullmatch(name)) or not first <= int(match[1]) < first + further
        }

    def _check(self, name: str) -> None:
        if name not in self._shapes:
            raise CheckpointError(f"The model in {self.path} has no tensor named {name!r}.")


def type_to_write(source: ModelSource) -> torch.dtype | None:
    """The type in which what is made of a model is written, unless a setting says otherwise.

    bfloat16 for a GGUF model that is stored quantised, whose numbers have no more bits than that
    holds: float32, as which its tensors are read, would take eight times the file's space. None
    for all others: each tensor keeps its own type.
    """
    return torch.bfloat16 if isinstance(source, GGUFSource) and source.quantised else None


def dequantise(
    file: GGUFFile | GGUFParts, name: str, entry: int | slice | None = None
) -> torch.Tensor:
    """Tensor `name` of `file` in memory of its own: fp32, or as stored for F32, F16 and BF16.

    Only entry `entry` of its first dimension, an expert, or some of its rows, where that is given.
    """
    info = file.tensors[name]
    raw, shape = file.raw(name), info.shape
    if isinstance(entry, slice):
        raw = raw.reshape(shape[0], -1)[entry]
        shape = (len(raw), *shape[1:])
    elif entry is not None:
        raw, shape = raw.reshape(shape[0], -1)[entry], shape[1:]
    if info.kind in _STORED or info.kind in _UNPACK:
        data = torch.from_numpy(raw.copy())
        file.release(name)
        if info.kind in _STORED:
            return data.view(_STORED[info.kind]).reshape(shape)
        return _UNPACK[info.kind](data).reshape(shape)
    values = _dequantise_with_package(file, name, raw.reshape(math.prod(shape[:-1]), -1))
    file.release(name)
    return torch.from_numpy(values).reshape(shape)


def _q8_0(data: torch.Tensor) -> torch.Tensor:
    blocks = data.reshape(-1, 34)
    return blocks[:, 2:].view(torch.int8).float().mul_(_half(blocks, 0))


def _q4_0(data: torch.Tensor) -> torch.Tensor:
    blocks = data.reshape(-1, 18)
    return _nibbles(blocks[:, 2:]).float().sub_(8).mul_(_half(blocks, 0))


def _q4_1(data: torch.Tensor) -> torch.Tensor:
    blocks = data.reshape(-1, 20)
    return _nibbles(blocks[:, 4:]).float().mul_(_half(blocks, 0)).add_(_half(blocks, 2))


_UNPACK = {"Q8_0": _q8_0, "Q4_0": _q4_0, "Q4_1": _q4_1}


def _half(blocks: torch.Tensor, start: int) -> torch.Tensor:
    """The fp16 number at byte `start` of each block, (blocks, 1) fp32."""
    return blocks[:, start : start + 2].contiguous().view(torch.float16).float()


def _nibbles(packed: torch.Tensor) -> torch.Tensor:
    """(blocks, 16) bytes -> (blocks, 32) values: all low halves, then all high halves."""
    return torch.cat([packed & 15, packed >> 4], dim=1)


def _dequantise_with_package(
    file: GGUFFile | GGUFParts, name: str, rows: np.ndarray[Any, np.dtype[np.uint8]]
) -> np.ndarray[Any, np.dtype[np.float32]]:
    info = file.tensors[name]
    try:
        from gguf import GGMLQuantizationType, quants
    except ImportError as error:
        raise ConfigError(
            f"{file.path}: tensor {name} is stored as {info.kind}; the `gguf` package can unpack "
            "that, and is not installed. Run: pip install gguf"
        ) from error
    try:
        values = quants.dequantize(rows, GGMLQuantizationType[info.kind])
    except (KeyError, NotImplementedError, ValueError) as error:
        raise CheckpointError(
            f"{file.path}: tensor {name} of type {info.kind} cannot be unpacked: {error}."
        ) from error
    return np.ascontiguousarray(values, dtype=np.float32)
