"""`engine merge`: add an adapter to the weights, tensor by tensor.

The sum is W + scale * B @ A, in fp32.
A DoRA adapter's sum V becomes m_i V_i / ||V_i||, row by row (`kernels.linear.dora`).

By default the sum goes onto the original weights, in the type they have. Merging onto the values
that 4-bit training saw (`onto="dequantised"`) reproduces the trained model exactly, with the error
of the quantisation kept in; the original weights are closer to what the base model was.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import torch

from engine.config.choices import MAX_SHARD_SIZE, MergeOnto
from engine.config.tasks.inference import EvalSettings
from engine.data.dataset import data_files
from engine.errors import CheckpointError, ConfigError
from engine.model_sources.adapter.adapted_source import AdaptedSource, with_pair
from engine.model_sources.adapter.provenance import base_name, read_base, say_base
from engine.model_sources.adapter_path import adapter_path, open_adapter
from engine.model_sources.expert_tensors import StoredExperts
from engine.model_sources.export import WrittenModel, write_directory
from engine.model_sources.open import open_model_source
from engine.runs.summary import write_summary
from engine.storage import durable
from engine.verbs.models.evaluate import evaluate_with
from kernels.nf4 import dequantize, quantize
from models.tensor_names import is_quantised

_LARGE = 1.02
"""From this quotient of perplexities on a difference is worth a warning."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class MergeResult:
    """`merged` weights of `written.tensors` took an adapter; `requantised` went through NF4.

    `check` has the perplexities that were asked for: of the adapter on the base that it was trained
    on, and of the merged model.
    """

    written: WrittenModel
    merged: int
    requantised: int
    check: dict[str, float] = field(default_factory=dict)

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
    check: Sequence[str | Path] = (),
) -> MergeResult:
    """Write `model` with `adapter` merged into it to the new folder `output`.

    `model` is a Hugging Face directory, a hub id or a GGUF file; `output` becomes a Hugging Face
    directory with the model's tokenizer. Each tensor keeps its type unless `dtype` names one for
    all (one that a GGUF file stores quantised becomes float32). Memory holds one tensor at a time.
    `check` names rows on which the merged model is compared with the adapter as it was trained.

    Raises `ConfigError` for an occupied output or an unknown option, and `CheckpointError` where an
    adapter tensor finds no weight of its shape, a result is not finite, or the disk refuses.
    """
    started = time.time()
    if onto not in get_args(MergeOnto):
        raise ConfigError(f"onto is {onto!r}; expected 'original' or 'dequantised'.")
    durable.refuse_occupied(Path(output))
    if check:
        data_files(list(map(str, check)))
    path = adapter_path(adapter)
    source = AdaptedSource(open_model_source(model), open_adapter(path))
    _require_expressible(source)
    record = read_base(path)
    used = base_name("nf4" if onto == "dequantised" else None, record.get("double_quant"))
    say_base(path, used, "--onto chooses the base, --check DATA measures what it comes to")
    # The scales of the weights that training saw, where the adapter says so.
    merger = _Merger(source, onto, double_quant=record.get("double_quant") is not False)
    parameters: dict[str, Any] = {"model": model, "adapter": adapter, "output": output}
    parameters |= {"onto": onto, "dtype": dtype, "max_shard_size": max_shard_size}

    def write_more(folder: Path) -> None:
        merged = source.folded + merger.merged
        write_summary(
            folder,
            "merge",
            parameters,
            started=started,
            metrics={"merged": merged, "requantised": merger.requantised},
            output_path=Path(output),
        )

    written = write_directory(source, output, merger, dtype, max_shard_size, write_more)
    measured = _perplexities(str(model), path, record, written.output, check) if check else {}
    return MergeResult(written, source.folded + merger.merged, merger.requantised, measured)


def _perplexities(
    model: str, adapter: Path, record: dict[str, Any], output: Path, rows: Sequence[str | Path]
) -> dict[str, float]:
    """Perplexity of the adapter on the base that it was trained on, and of the merged model."""
    given: dict[str, Any] = {"data": list(map(str, rows))}
    trained = EvalSettings(
        model=model,
        adapter=adapter,
        quantize=record.get("quantization"),
        double_quant=record.get("double_quant") is not False,
        **given,
    )
    merged = EvalSettings(model=str(output), **given)
    before, after = (evaluate_with(settings).perplexity for settings in (trained, merged))
    if after > before * _LARGE:
        log.warning(
            "the merged model has a perplexity of %.4f on these rows, the adapter as it was "
            "trained %.4f; --onto dequantised merges onto what training saw", after, before,
        )  # fmt: skip
    return {"perplexity_trained": before, "perplexity_merged": after}


def _require_expressible(source: AdaptedSource) -> None:
    """Raises `CheckpointError` where no config.json could say what the merged model is."""
    if source.biased.inexpressible:
        raise CheckpointError(
            f"{source.adapter.path} gives {source.biased.inexpressible} of a "
            f"{source.config.model_type} model a bias (lora_bias), for which its files have no "
            "key: every program would leave it out. Use the adapter with --adapter instead."
        )


class _Merger:
    """Turns each tensor of the base into that of the merged model; uses every pair once."""

    def __init__(self, source: AdaptedSource, onto: MergeOnto, *, double_quant: bool) -> None:
        self._source = source
        self._pairs = {f"{module}.weight": pair for module, pair in source.pairs.items()}
        self._onto = onto
        self._experts = StoredExperts(source)
        self._double_quant = double_quant
        self.merged = 0
        self.requantised = 0

    def __call__(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        if self._experts.fuses(name):
            return self._merge_experts(name, tensor)
        through = self._onto == "dequantised" and name not in self._source.copied
        if through and self._experts.holds(name):
            tensor = self._experts.through_nf4(name, self._double_quant)
            self.requantised += 1
        elif through and is_quantised(name):
            tensor = _through_nf4(name, tensor, self._double_quant)
            self.requantised += 1
        pair = self._pairs.pop(name, None)
        if pair is None:
            return tensor
        self.merged += 1
        return with_pair(tensor, pair, self._source.scales[name.removesuffix(".weight")])

    def _merge_experts(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor of all experts' weights (E, out, in); every expert has pairs of its own."""
        merged = tensor
        if self._onto == "dequantised":
            merged = self._experts.through_nf4(name, self._double_quant)
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
                target.addmm_(b, a, alpha=self._source.scales[path])
                self.merged += 1
        return merged


def _through_nf4(name: str, tensor: torch.Tensor, double_quant: bool) -> torch.Tensor:
    try:
        return dequantize(quantize(tensor, double_quant=double_quant), dtype=torch.float32)
    except ValueError as error:
        raise CheckpointError(f"tensor {name} cannot be quantised: {error}.") from error
