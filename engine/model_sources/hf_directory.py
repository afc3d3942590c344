"""A Hugging Face model directory, safetensors included.

Weights are one `model.safetensors`, or shards that `model.safetensors.index.json` names in its
`weight_map`. The index is only believed as far as it can be checked: every value must be the plain
name of a file in this directory, and every tensor must really stand in the shard it names, with the
shape that the configuration asks for. Pickles are never read.
"""

from __future__ import annotations

import logging
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from engine.errors import CheckpointError, listing
from engine.model_sources.interface.checks import match_tensors, quick_digest
from engine.model_sources.model_files import ModelFiles, folder_hint
from engine.model_sources.quantised.group import with_quantised
from engine.model_sources.quantised.methods import method_of
from engine.model_sources.safetensors.file import SafetensorsFile
from engine.model_sources.safetensors.stored_tensors import (
    Home,
    Stored,
    StoredTensor,
    drop_unused,
    settle_head,
    stored_tensors,
    with_decoder_prefix,
)
from engine.storage.safe_files import MIB, is_pickle, read_json_object, refuse_pickle
from kernels.linear.int8 import Int8Weight
from kernels.nf4 import NF4Weight
from models.config.model_config import ModelConfig
from models.tensor_layout import Layout, carried_prefixes
from models.tensor_names import expected_tensors

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
_SHARD = re.compile(r"[\w.\-]+\.safetensors")

log = logging.getLogger(__name__)


class HFDirectory(ModelFiles):
    """The model in folder `path`, weights included; see `ModelSource` for its methods.

    Raises `ConfigError` for a missing or unusable config.json, and `CheckpointError` for weights
    that are missing, damaged or of another model.
    """

    def __init__(self, path: Path | str) -> None:
        super().__init__(path)
        self._files = self._open_weights()
        whole = with_quantised(stored_tensors(self._files), self.raw_config, self.path)
        self._note_quantisation(whole)
        home = with_decoder_prefix(whole, self.config)
        tied = settle_head(
            home, self.config, untied=_is_untied(self.raw_config, self.config), source=str(path)
        )
        self.config = replace(self.config, tie_word_embeddings=tied)
        self._home = _select(home, self.config, str(self.path))

    def names(self) -> list[str]:
        return list(self._home)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._stored(name).shape

    def dtype(self, name: str) -> torch.dtype:
        return self._stored(name).dtype

    def tensor(self, name: str) -> torch.Tensor:
        return self._stored(name).tensor()

    def codes(self, name: str) -> NF4Weight | Int8Weight | None:
        return self._stored(name).codes()

    def stored_as(self, name: str) -> str | None:
        return self._stored(name).form

    def release(self, name: str) -> None:
        self._stored(name).release()

    def digest(self) -> str:
        return quick_digest(self.raw_config, [file.path for file in self._files])

    def _stored(self, name: str) -> Stored:
        if name not in self._home:
            raise CheckpointError(f"The model in {self.path} has no tensor named {name!r}.")
        return self._home[name]

    def _note_quantisation(self, home: Home) -> None:
        """Warn of a note of quantised weights beside 16-bit ones, which is left over."""
        method = method_of(self.raw_config)
        if method and all(isinstance(stored, StoredTensor) for stored in home.values()):
            log.warning(
                "%s: quantization_config (%s) is ignored: the weights are not quantised",
                self.path, method,
            )  # fmt: skip

    def _open_weights(self) -> list[SafetensorsFile]:
        if (self.path / WEIGHTS).exists():
            return [SafetensorsFile(self.path / WEIGHTS)]
        if (self.path / INDEX).exists():
            return _open_shards(self.path)
        others = sorted(path for path in self.path.iterdir() if path.is_file())
        pickles = [path for path in others if path.suffix != ".safetensors" and is_pickle(path)]
        if pickles:
            refuse_pickle(pickles[0])
        raise CheckpointError(
            f"{self.path} holds a config.json and no weights: neither {WEIGHTS} nor {INDEX} is "
            f"there.{folder_hint(self.path)} Download the model's safetensors files."
        )


def _open_shards(folder: Path) -> list[SafetensorsFile]:
    """Open every shard the index names, and check that each tensor stands where the index says."""
    index_path = folder / INDEX
    weight_map = read_json_object(index_path, limit=32 * MIB).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index_path} has no weight_map, which says what stands where.")
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or len(shard) > 255 or not _SHARD.fullmatch(shard):
            raise CheckpointError(
                f"{index_path}: tensor {name[:80]!r} is said to be in {str(shard)[:120]!r}; "
                "expected the plain name of a .safetensors file in the same folder."
            )
    shards = sorted(set(weight_map.values()))
    absent = [shard for shard in shards if not (folder / shard).exists()]
    if absent:
        raise CheckpointError(
            f"{folder} lacks {len(absent)} of {len(shards)} weight files that its index names: "
            f"{listing(absent)}. Download them again."
        )
    files = [SafetensorsFile(folder / shard) for shard in shards]
    home = {name: file.path.name for file in files for name in file.keys()}  # noqa: SIM118
    total = sum(len(file.keys()) for file in files)
    strays = [name for name, shard in weight_map.items() if home.get(name) != shard]
    if strays or len(home) != total or len(home) != len(weight_map):
        odd = strays or sorted(set(home) - set(weight_map)) or ["a tensor that two shards hold"]
        raise CheckpointError(
            f"{index_path} does not agree with the files in its folder about {len(odd)} tensors: "
            f"{listing(odd)}. Download the index and the files again, from one revision."
        )
    return files


def _is_untied(raw: dict[str, Any], config: ModelConfig) -> bool:
    """Whether a stored head counts although `text_config` alone calls it tied.

    transformers takes the flag from the outer part of such a configuration, and reads its absence
    there as untied.
    """
    return config.nested and "tie_word_embeddings" not in raw


def _select(home: Home, config: ModelConfig, source: str) -> Home:
    """Of `home` exactly the tensors of a model of `config`, in its order.

    After them come those of the model's other parts (vision, multi-token prediction), if any.
    """
    carried = {n: home.pop(n) for n in list(home) if n.startswith(carried_prefixes(config))}
    expected = expected_tensors(config, Layout.of_names(config, home))
    drop_unused(home, expected, config, source)
    match_tensors({name: stored.shape for name, stored in home.items()}, expected, source)
    odd = [name for name in expected if not home[name].dtype.is_floating_point]
    if odd:
        raise CheckpointError(
            f"{source}: {len(odd)} weights are not floating point numbers: {listing(odd)}. "
            "Take the model's original 16-bit files."
        )
    return {name: home[name] for name in expected} | carried
