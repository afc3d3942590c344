"""Which format each tensor of a GGUF file gets.

A file type names the format of most matrices. As in llama.cpp, the head has six bits or more, and
the types `..._k_m` give the value projections and half of the down projections six. Where rows are
no multiple of a format's block, the next larger format with blocks of 32 takes its place.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from engine.errors import ConfigError
from engine.exporting.gguf_layout import GGUFTensor
from kernels.gguf import FORMATS
from models.config.model_config import ModelConfig

FLOATS = {"f32": 0, "f16": 1, "bf16": 30}
"""Formats that are no blocks, and GGUF's ids of them."""


@dataclass(frozen=True)
class FileType:
    """`number` is llama.cpp's id; `most` the format of most matrices, `finer` of some."""

    number: int
    most: str
    finer: str | None = None


FILE_TYPES = {
    "f32": FileType(0, "f32"),
    "f16": FileType(1, "f16"),
    "bf16": FileType(32, "bf16"),
    "q8_0": FileType(7, "q8_0"),
    "q4_0": FileType(2, "q4_0"),
    "q5_1": FileType(9, "q5_1"),
    "q4_k_m": FileType(15, "q4_k", "q6_k"),
    "q5_k_m": FileType(17, "q5_k", "q6_k"),
    "q6_k": FileType(18, "q6_k"),
}
_SMALLER_BLOCKS = {"q4_k": "q5_0", "q5_k": "q5_1", "q6_k": "q8_0"}


def format_of(tensor: GGUFTensor, config: ModelConfig, file_type: FileType) -> str:
    """The format of a tensor in a file of this type."""
    if tensor.exact:
        return "f32"
    wanted = _wanted(tensor.name, config, file_type)
    if wanted in FLOATS:
        return wanted
    columns = tensor.shape[-1]
    if columns % FORMATS[wanted].size:
        wanted = _SMALLER_BLOCKS.get(wanted, "f16")
    return wanted if wanted in FORMATS and columns % FORMATS[wanted].size == 0 else "f16"


def _wanted(name: str, config: ModelConfig, file_type: FileType) -> str:
    if file_type.most in FLOATS:
        return file_type.most
    head = "token_embd.weight" if config.tie_word_embeddings else "output.weight"
    if name == head:
        return "q8_0" if file_type.most == "q8_0" else "q6_k"
    if file_type.finer is None or not name.startswith("blk."):
        return file_type.most
    number, kind = int(name.split(".")[1]), name.split(".")[2]
    if kind == "attn_qkv":
        return "q5_k" if file_type.most == "q4_k" else "q6_k"
    if kind in ("attn_v", "ffn_down", "ffn_down_exps") and _finer(number, config):
        return file_type.finer
    return file_type.most


def _finer(layer: int, config: ModelConfig) -> bool:
    """The first eighth, the last eighth, and every third layer between: llama.cpp's choice."""
    layers = config.num_hidden_layers
    first, last = layers // 8, 7 * layers // 8
    return layer < first or layer >= last or (layer - first) % 3 == 2


def bytes_of(shape: tuple[int, ...], form: str) -> int:
    """The size of a tensor of `shape` in a format."""
    elements = math.prod(shape)
    if form in FLOATS:
        return elements * (4 if form == "f32" else 2)
    block = FORMATS[form]
    return elements // block.size * block.bytes


def file_type(name: str) -> FileType:
    """A file type by its name in any case. Raises `ConfigError`."""
    key = name.lower()
    if key not in FILE_TYPES:
        raise ConfigError(f"There is no type {name!r} of GGUF files; use {', '.join(FILE_TYPES)}.")
    return FILE_TYPES[key]
