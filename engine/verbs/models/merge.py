"""`engine merge`: write a model with adapters merged into its weights.

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
from typing import Any

import torch

from engine.config.choices import Quantization
from engine.config.given_adapters import WeightedPath
from engine.config.tasks.inference import EvalSettings
from engine.config.tasks.quantizing import MergeSettings
from engine.data.sources.resolve import data_files
from engine.errors import CheckpointError, ConfigError
from engine.exporting.merging import BelowPairs, Merger
from engine.exporting.publish import destination, publish_folder
from engine.exporting.readme import model_readme, named_adapters
from engine.inference.agreement import require_agreement
from engine.inference.loading import check_adapter
from engine.memory.random_model import open_base
from engine.model_sources.adapter.adapted_source import AdaptedSource
from engine.model_sources.adapter.provenance import base_name, read_base, say_base
from engine.model_sources.export import WrittenModel, parse_dtype, write_directory
from engine.model_sources.hf_directory import HFDirectory
from engine.model_sources.interface.model_source import ModelSource
from engine.model_sources.load_model import adapted
from engine.model_sources.open import open_model_source
from engine.model_sources.quantised.fates import loaded_fate, say
from engine.model_sources.quantised.stored_codes import used_weights
from engine.runs.summary import write_summary
from engine.storage import durable
from engine.verbs.models.evaluate import evaluate_with

_LARGE = 1.02
"""From this quotient of perplexities on a difference is worth a warning."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class MergeResult:
    """`merged` weights of `written.tensors` took an adapter; `requantised` went through NF4.

    `logit_difference` is what `engine.inference.agreement` measured, None where it was not asked.
    `check` has the perplexities that were asked for: of the adapter on the base that it was trained
    on, and of the merged model. `pushed` is the address of the upload.
    """

    written: WrittenModel
    merged: int
    requantised: int
    check: dict[str, float] = field(default_factory=dict)
    logit_difference: float | None = None
    pushed: str | None = None

    @property
    def output(self) -> Path:
        """The folder that was written."""
        return self.written.output


def merge(
    model: str | Path,
    adapter: str | Path | Sequence[str | Path | tuple[str | Path, float]],
    output: str | Path,
    *,
    dtype: torch.dtype | str | None = None,
    check: str | Path | Sequence[str | Path] = (),
    **options: Any,
) -> MergeResult:
    """Write `model` with `adapter` merged into it to the new folder `output`.

    `model` is a Hugging Face directory, a hub id or a GGUF file, `adapter` one adapter or several,
    each by itself or as `(path, weight)`: the weighted sum of what they do is merged. `options` are
    the other settings of `MergeSettings`. Raises as `merge_with`.
    """
    given: dict[str, Any] = {"model": model, "adapter": adapter, "output": output}
    given |= {"dtype": dtype, "check": check}
    return merge_with(MergeSettings(**given, **options))


def merge_with(settings: MergeSettings) -> MergeResult:
    """Merge as `settings` ask for it.

    The output becomes a Hugging Face directory with the model's tokenizer. Each tensor keeps its
    type unless `dtype` names one for all (one that a GGUF file stores quantised becomes float32).
    Memory holds one tensor at a time. With `verify` the result must give the logits of model and
    adapter before it appears; `check` names rows on which the merged model is compared with the
    adapter as it was trained.

    Raises `ConfigError` for an occupied output, an unknown option or adapters that cannot be added
    up, and `CheckpointError` where an adapter tensor finds no weight of its shape, a result is not
    finite or computes something else, or the disk refuses.
    """
    started = time.time()
    where = destination(settings)
    durable.refuse_occupied(settings.output)
    if settings.check:
        data_files(list(settings.check), settings.query)
    check_adapter(settings)
    if settings.random_weights and settings.check:
        raise ConfigError("--check reads rows; random weights have no tokenizer for them.")
    base = open_base(settings.model, settings.random_weights)
    source = adapted_source(base, settings.adapter)
    nested = _say_bases(source, settings)
    asked: Quantization | None = "nf4" if settings.onto == "dequantised" else None
    say(source, loaded_fate(source, asked, written=True))
    dtype = parse_dtype(settings.dtype)
    merger = Merger(source, settings.onto, double_quant=nested, dtype=dtype)
    apart: list[float] = []

    def write_more(folder: Path) -> None:
        if settings.verify:
            below = BelowPairs(source, settings.onto, double_quant=nested)
            apart.append(require_agreement(below, source.pairs, source.scales, HFDirectory(folder)))
        merged = source.folded + merger.merged
        figures: dict[str, Any] = {"merged": merged, "requantised": merger.requantised}
        figures |= {"logit_difference": apart[0]} if apart else {}
        parameters = settings.model_dump()
        output = settings.output
        write_summary(
            folder, "merge", parameters, started=started, metrics=figures, output_path=output
        )
        facts = {
            "base weights": "random, to measure" if settings.random_weights else None,
            "base digest": source.base.digest(),
            "merged onto": settings.onto + " weights",
            "weights with an adapter": merged,
            "largest relative difference of logits": f"{apart[0]:.2g}" if apart else None,
        }
        adapters = named_adapters(source.adapter.paths, settings.adapter)
        text = model_readme(settings.model, adapters, ("merged",), facts)
        durable.write_text(folder / "README.md", text)

    written = write_directory(
        source, settings.output, merger, dtype, settings.max_shard_size, write_more
    )
    measured = _perplexities(source, settings) if settings.check else {}
    return MergeResult(
        written,
        source.folded + merger.merged,
        merger.requantised,
        measured,
        apart[0] if apart else None,
        publish_folder(where, written.output, settings.model),
    )


def adapted_source(model: str | ModelSource, adapters: Sequence[WeightedPath]) -> AdaptedSource:
    """The model with its adapters, to be written as one. Raises as `merge_with`."""
    base = open_model_source(model) if isinstance(model, str) else model
    source = adapted(base, adapters)
    _require_expressible(source)
    return source


def _say_bases(source: AdaptedSource, settings: MergeSettings) -> bool:
    """Say which weights the sum goes onto; whether NF4 scales are nested, as training had them."""
    records = [read_base(path) for path in source.adapter.paths]
    nested = all(record.get("double_quant") is not False for record in records)
    used = base_name(
        *used_weights(source, "nf4" if settings.onto == "dequantised" else None, nested)
    )
    advice = "--onto chooses the base, --check DATA measures what it comes to"
    for path in source.adapter.paths:
        say_base(path, used, advice, source.base.digest())
    return nested


def _perplexities(source: AdaptedSource, settings: MergeSettings) -> dict[str, float]:
    """Perplexity of the adapter on the base that it was trained on, and of the merged model."""
    given: dict[str, Any] = {"data": settings.check, "query": settings.query}
    record = read_base(source.adapter.path)
    trained = EvalSettings(
        model=settings.model,
        adapter=settings.adapter,
        quantize=record.get("quantization"),
        double_quant=record.get("double_quant") is not False,
        **given,
    )
    merged = EvalSettings(model=str(settings.output), **given)
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
