"""Where a model's tensors stand in its files, under which names.

Files of the world name a model's tensors in more ways than one: saved from a model without its head
they lack `model.`, saved with `safetensors.save_model` one of two equal tensors is an alias in the
metadata, saved from a compiled or wrapped model all have a prefix. The names here are those of the
hub's files.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import Protocol

import torch

from engine.errors import listing
from engine.model_sources.safetensors.file import SafetensorsFile
from kernels.linear.int8 import Int8Weight
from kernels.nf4 import NF4Weight
from models.config.model_config import ModelConfig
from models.tensor_layout import Layout, carried_prefixes
from models.tensor_names import expected_tensors

log = logging.getLogger(__name__)

HEAD = "lm_head.weight"
_WRAPPERS = ("_orig_mod.", "module.")
# Buffers that old files carry and that follow from the configuration, and scales of caches.
_DERIVED = re.compile(r".*\.(rotary_emb\.\w+|masked_bias|self_attn\.bias|[kv]_scale|kv_scale)")
_BLOCK = 1 << 22


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a file, by the name it has there."""

    file: SafetensorsFile
    name: str

    @property
    def shape(self) -> tuple[int, ...]:
        return self.file.shape(self.name)

    @property
    def dtype(self) -> torch.dtype:
        return self.file.dtype(self.name)

    def tensor(self) -> torch.Tensor:
        """The tensor, a view of the mapped file."""
        return self.file.tensor(self.name)

    def codes(self) -> None:
        """None: it is not quantised."""

    @property
    def form(self) -> None:
        """None: it is not quantised."""

    def release(self) -> None:
        """Let go of its pages."""
        self.file.release(self.name)


class Stored(Protocol):
    """A tensor as its model's configuration means it, which several of a file may make up."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""

    @property
    def dtype(self) -> torch.dtype:
        """The type of `tensor()`."""

    def tensor(self) -> torch.Tensor:
        """The tensor, decoded where it is quantised; it may be a view of the mapped file."""

    def codes(self) -> NF4Weight | Int8Weight | None:
        """The quantised weight, views of the file, where the kernels compute with such codes."""

    @property
    def form(self) -> str | None:
        """The name of its quantisation; None where it has none."""

    def release(self) -> None:
        """Let go of its pages."""


Home = dict[str, Stored]


def stored_tensors(files: Collection[SafetensorsFile]) -> dict[str, StoredTensor]:
    """All tensors of `files`, by their names without those of aliases and wrappers."""
    home = {name: StoredTensor(file, name) for file in files for name in file.keys()}  # noqa: SIM118
    for file in files:
        for alias, name in file.metadata.items():
            if name in home and alias not in home:
                home[alias] = home[name]
    for prefix in _WRAPPERS:
        if all(name.startswith(prefix) for name in home):
            home = {name.removeprefix(prefix): stored for name, stored in home.items()}
    return home


def with_decoder_prefix(home: Home, config: ModelConfig) -> Home:
    """`home` with `model.` in front of names that lack it, as files of the hub have them."""
    if any(name.startswith("model.") for name in home):
        return home
    expected = expected_tensors(config, Layout.of_names(config, home))
    carried = carried_prefixes(config)

    def full(name: str) -> str:
        with_prefix = f"model.{name}"
        known = with_prefix in expected or with_prefix.startswith(carried)
        return with_prefix if known else name

    return {full(name): stored for name, stored in home.items()}


def settle_head(home: Home, config: ModelConfig, *, untied: bool, source: str) -> bool:
    """Decide whether the head is the embedding, and leave in `home` what is used of the two.

    `untied` says that a stored head counts whatever the configuration says. A head that differs
    from the embedding although the two are called tied is used, as transformers 5 does, with a
    warning.
    """
    embedding = Layout(config.nested).path("model.embed_tokens.weight")
    if not config.tie_word_embeddings or HEAD not in home:
        return config.tie_word_embeddings
    if embedding not in home:  # of two equal tensors, a program saved the one it found first
        home[embedding] = home.pop(HEAD)
        return True
    if untied:
        return False
    if home[HEAD] == home[embedding] or _equal(home[HEAD], home[embedding]):
        del home[HEAD]
        return True
    log.warning(
        "%s: tie_word_embeddings is true, but %s is stored and differs from the embedding; the "
        "stored head is used", source, HEAD,
    )  # fmt: skip
    return False


def _equal(left: Stored, right: Stored) -> bool:
    """Whether two tensors have the same values, read in parts up to the first difference."""
    if left.shape != right.shape:
        return False
    parts = zip(
        left.tensor().reshape(-1).split(_BLOCK),
        right.tensor().reshape(-1).split(_BLOCK),
        strict=True,
    )
    equal = all(torch.equal(a.float(), b.float()) for a, b in parts)
    left.release()
    right.release()
    return equal


def drop_unused(home: Home, expected: Collection[str], config: ModelConfig, source: str) -> None:
    """Remove from `home` what no decoder reads: derived buffers, and parts beside the decoder.

    What stands inside the decoder and is not known stays, to be refused: it may change the
    arithmetic.
    """
    derived = [name for name in home if name not in expected and _DERIVED.fullmatch(name)]
    for name in derived:
        del home[name]
    decoder = Layout(config.nested).path("model.")
    inside = (f"{decoder}layers.", f"{decoder}embed_tokens.", f"{decoder}norm.", "lm_head.")
    beside = [name for name in home if name not in expected and not name.startswith(inside)]
    for name in beside:
        del home[name]
    if beside:
        log.warning(
            "%s: %d tensors beside the decoder are not read: %s",
            source, len(beside), listing(sorted(beside)),
        )  # fmt: skip
