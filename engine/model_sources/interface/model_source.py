"""`ModelSource`: what every source of a pretrained model offers.

A source is a Hugging Face directory, quantised or not, or a GGUF file. Whatever it is, its tensors
carry Hugging Face's names and layout, its configuration is that of `config.json` in transformers 5
spelling, and its tokenizer is a `tokenizers` JSON or a SentencePiece file.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import torch

from kernels.linear.int8 import Int8Weight
from kernels.nf4 import NF4Weight
from models.config.model_config import ModelConfig


class TokenizerSource(Protocol):
    """A tokenizer's files and chat templates."""

    @property
    def path(self) -> Path:
        """The folder or file that was opened."""

    @property
    def raw_config(self) -> dict[str, Any]:
        """The parsed config.json, or what it would hold; empty without a model."""

    def tokenizer_json(self) -> str | None:
        """The serialised `tokenizers` tokenizer, or None where the source has none."""

    def tokenizer_model(self) -> Path | None:
        """The SentencePiece file, or None where the source has none."""

    def tokenizer_config(self) -> dict[str, Any]:
        """`tokenizer_config.json`, empty where there is none."""

    def chat_template(self, name: str = "default") -> str | None:
        """The Jinja text of a chat template by its name, or None where the source has none."""

    def tokenizer_files(self) -> dict[str, bytes]:
        """Relative name -> content of every other file of a model saved from this one."""


class ModelDescription(TokenizerSource, Protocol):
    """A pretrained model without its weights: configuration, tokenizer and templates."""

    @property
    def config(self) -> ModelConfig:
        """Shape and arithmetic of the model."""

    @property
    def generation_config(self) -> dict[str, Any]:
        """The parsed generation_config.json, or what it would hold; empty where unknown."""


class ModelSource(ModelDescription, Protocol):
    """A pretrained model on disk. Tensors are read one at a time, on the CPU."""

    def names(self) -> list[str]:
        """Names of the tensors: those that `models.tensor_names.expected_tensors` lists for the
        file's layout, then those of other parts (`models.tensor_layout.carried_prefixes`)."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of tensor `name`."""

    def dtype(self, name: str) -> torch.dtype:
        """Type that `tensor(name)` has; float32 for a tensor that a GGUF file stores quantised."""

    def tensor(self, name: str) -> torch.Tensor:
        """Tensor `name`, on the CPU. It may be a view of a mapped file: copy it to keep it."""

    def codes(self, name: str) -> NF4Weight | Int8Weight | None:
        """Tensor `name` as it is stored, where that is in NF4 or 8-bit rows; else None.

        `tensor(name)` is what these codes decode to. They may be views of a mapped file.
        """

    def stored_as(self, name: str) -> str | None:
        """How the files hold tensor `name` (NF4, fp8, Q4_K, ...); None in 16 bits or more."""

    def release(self, name: str) -> None:
        """Say that no view of tensor `name` is in use, so that its pages can leave memory."""

    def digest(self) -> str:
        """SHA-256 in hexadecimal that tells this model from another; see `quick_digest`."""
