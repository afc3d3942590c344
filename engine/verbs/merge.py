"""`engine merge`: add an adapter to the weights, tensor by tensor.

The sum is W + scale * B @ A, in fp32.
A DoRA adapter's sum V becomes m_i V_i / ||V_i||, row by row (`kernels.linear.dora`).

By default the sum goes onto the original weights, in the type they have. Merging onto the values
that 4-bit training saw (`onto="dequantised"`) reproduces the trained model exactly, with the error
of the quantisation kept in; the original weights are closer to what the base model was.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import torch

from engine.config.choices import MAX_SHARD_SIZE, MergeOnto
from engine.errors import CheckpointError, ConfigError, listing
from engine.model_sources.adapter.peft import AdapterConfig, Pairs, load_adapter
from engine.model_sources.expert_tensors import StoredExperts
from engine.model_sources.export import WrittenModel, write_directory
from engine.model_sources.interface.model_source import ModelSource
from engine.model_sources.open import open_model_source
from kernels.linear.dora import scale_rows_
from kernels.nf4 import dequantize, quantize
from models.config.model_config import ModelConfig
from models.tensor_layout import path_in_file
from models.tensor_names import expected_tensors, is_quantised


@dataclass(frozen=True)
class MergeResult:
    """`merged` weights of `written.tensors` took an adapter; `requantised` went through NF4."""

    written: WrittenModel
    merged: int
    requantised: int

    @property
    def output(self) -> Path:
        """The folder that was written."""
        return self.written.output


def merge(
    model: str | Path,
    adapter: str | Path,
    output: str | Path,
    *,
    max_shard_size: int = MAX_SHARD_SIZE,
    onto: MergeOnto = "original",
    dtype: torch.dtype | str | None = None,
) -> MergeResult:
    """Write `model` with `adapter` merged into it to the new folder `output`.

    `model` is a Hugging Face directory, a hub id or a GGUF file; `output` becomes a Hugging Face
    directory with the model's tokenizer. Each tensor keeps its type unless `dtype` names one for
    all (one that a GGUF file stores quantised becomes float32). Memory holds one tensor at a time.

    Raises `ConfigError` for an occupied output or an unknown option, and `CheckpointError` where an
    adapter tensor finds no weight of its shape, a result is not finite, or the disk refuses.
    """
    if onto not in get_args(MergeOnto):
        raise ConfigError(f"onto is {onto!r}; expected 'original' or 'dequantised'.")
    source = open_model_source(model)
    config, pairs = load_adapter(Path(adapter))
    pairs = {path_in_file(source.config, path): pair for path, pair in pairs.items()}
    _check_fit(source, pairs, Path(adapter))
    merger = _Merger(source, config, pairs, onto)
    written = write_directory(source, output, merger, dtype, max_shard_size)
    return MergeResult(written, merger.merged, merger.requantised)


def host_peak(
    model: ModelConfig, stored: torch.dtype, targets: Collection[str], adapter_bytes: int
) -> int:
    """The most bytes of host memory that merging onto the original weights takes.

    The adapter is held whole, and of one tensor after the other the mapped original; where it is
    adapted, also the sum in fp32 and the sum rounded. A model's depth does not matter. For
    Llama-3.3-70B in bf16 a `down_proj` of 28,672 x 8,192 takes 0.47 + 0.94 + 0.47 = 1.88 GB and the
    embedding, which is only copied, 2.10 GB; an adapter of rank 16 in fp32 adds 0.83 GB.
    """
    most = 0
    for name, shape in expected_tensors(model).items():
        leaf = name.removesuffix(".weight").rpartition(".")[2]
        adapted = leaf in targets or (leaf == "gate_up_proj" and "gate_proj" in targets)
        width = 2 * stored.itemsize + 4 if adapted and len(shape) > 1 else stored.itemsize
        most = max(most, width * math.prod(shape))
    return most + adapter_bytes


class _Merger:
    """Turns each tensor of the base into that of the merged model; uses every pair once."""

    def __init__(
        self, source: ModelSource, config: AdapterConfig, pairs: Pairs, onto: MergeOnto
    ) -> None:
        self._scale = config.scale
        self._pairs = {f"{module}.weight": pair for module, pair in pairs.items()}
        self._onto = onto
        self._experts = StoredExperts(source)
        self.merged = 0
        self.requantised = 0

    def __call__(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        if self._experts.fuses(name):
            return self._merge_experts(name, tensor)
        if self._onto == "dequantised" and self._experts.holds(name):
            tensor = self._experts.through_nf4(name)
            self.requantised += 1
        elif self._onto == "dequantised" and is_quantised(name):
            tensor = _through_nf4(name, tensor)
            self.requantised += 1
        pair = self._pairs.pop(name, None)
        if pair is None:
            return tensor
        self.merged += 1
        a, b, *magnitude = pair
        merged = tensor.to(torch.float32, copy=True).addmm_(b, a, alpha=self._scale)
        return scale_rows_(merged, magnitude[0]) if magnitude else merged

    def _merge_experts(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor of all experts' weights (E, out, in); every expert has pairs of its own."""
        merged = tensor
        if self._onto == "dequantised":
            merged = self._experts.through_nf4(name)
            self.requantised += 1
        pairs = {
            path: self._pairs.pop(f"{path}.weight")
            for path in self._experts.modules(name, tensor)
            if f"{path}.weight" in self._pairs
        }
        if not pairs:
            return merged
        merged = merged.to(torch.float32, copy=True)
        for path, target in self._experts.modules(name, merged).items():
            if path in pairs:
                a, b, *_ = pairs[path]
                target.addmm_(b, a, alpha=self._scale)
                self.merged += 1
        return merged


def _through_nf4(name: str, tensor: torch.Tensor) -> torch.Tensor:
    try:
        return dequantize(quantize(tensor), dtype=torch.float32)
    except ValueError as error:
        raise CheckpointError(f"tensor {name} cannot be quantised: {error}.") from error


def _check_fit(source: ModelSource, pairs: Pairs, adapter: Path) -> None:
    """Every pair of the adapter must have a weight of its shape in the model."""
    shapes = StoredExperts(source).adaptable()
    strays = [module for module in pairs if module not in shapes]
    if "lm_head" in strays and source.config.tie_word_embeddings:
        raise CheckpointError(
            f"{adapter} adapts lm_head, which {source.path} shares with its embedding; merging "
            "would change both. Keep this adapter separate."
        )
    wrong = [
        f"{module} has {list(shapes[module])}, the adapter [{b.shape[0]}, {a.shape[1]}]"
        for module, (a, b, *_) in pairs.items()
        if module in shapes and shapes[module] != (b.shape[0], a.shape[1])
    ]
    if strays or wrong:
        raise CheckpointError(
            f"The adapter {adapter} does not fit the model {source.path}. Modules that the "
            f"model does not have: {listing(strays) or 'none'}. Of another shape: "
            f"{listing(wrong) or 'none'}. Name the model that the adapter was trained on."
        )
