"""`engine quantize`: write a model in 4, 8 or 16 bits."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from engine.config.tasks.inference import EvalSettings
from engine.config.tasks.quantizing import QuantizeSettings
from engine.data.sources.resolve import data_files
from engine.errors import ConfigError
from engine.exporting.merging import Merger
from engine.exporting.publish import destination, publish_folder
from engine.exporting.readme import model_readme, named_adapters
from engine.inference.loading import check_adapter
from engine.memory.random_model import open_base
from engine.model_sources.adapter.adapted_source import AdaptedSource
from engine.model_sources.export import WrittenModel, parse_dtype, write_directory
from engine.model_sources.interface.model_source import ModelSource
from engine.model_sources.quantised.fates import STAYS, Fate, say
from engine.model_sources.quantised.write import Encoding
from engine.runs.summary import write_summary
from engine.storage import durable
from engine.verbs.models.evaluate import evaluate_with
from engine.verbs.models.merge import adapted_source

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class QuantizeResult:
    """`quantised` weights were quantised here, `copied` keep the codes of the source.

    `bytes_before` are those of the source's files. `perplexity` has `perplexity_before` and
    `perplexity_after`, where rows were given; `pushed` is the address of the upload.
    """

    written: WrittenModel
    bits: int
    quantised: int
    copied: int
    bytes_before: int
    bytes_after: int
    perplexity: dict[str, float] = field(default_factory=dict)
    pushed: str | None = None

    @property
    def output(self) -> Path:
        """The folder that was written."""
        return self.written.output


def quantize(
    model: str | Path,
    output: str | Path,
    *,
    bits: int = 4,
    data: str | Path | Sequence[str | Path] = (),
    **options: Any,
) -> QuantizeResult:
    """Write `model` in `bits` bits to the new folder `output`.

    `options` are the other settings of `QuantizeSettings`. Raises as `quantize_with`.
    """
    given: dict[str, Any] = {"model": model, "output": output, "bits": bits, "data": data}
    return quantize_with(QuantizeSettings(**given, **options))


def quantize_with(settings: QuantizeSettings) -> QuantizeResult:
    """Quantise as `settings` ask for it: what bitsandbytes writes, or plain 16 bits.

    An adapter is merged in the same pass, tensor by tensor, and its sum is what is quantised.

    Raises `ConfigError` for an occupied output, and `CheckpointError` for files that are damaged, a
    weight that cannot be quantised, or if the disk refuses.
    """
    started = time.time()
    where = destination(settings)
    durable.refuse_occupied(settings.output)
    if settings.data:
        data_files(list(settings.data), settings.query)
    check_adapter(settings)
    _require_tokenizer(settings)
    base = open_base(settings.model, settings.random_weights)
    adapted = adapted_source(base, settings.adapter) if settings.adapter else None
    source = adapted or base
    dtype = parse_dtype(settings.dtype) or _sixteen_bits(source)
    encoding = None
    if settings.bits != 16:
        changed = [f"{module}.weight" for module in adapted.pairs] if adapted else []
        encoding = Encoding(source, settings.bits, dtype, changed)
        _say_experts(source, settings.bits)
    say(source, _fate(source, encoding))
    transform = (
        Merger(adapted, "original", double_quant=True, dtype=dtype)
        if adapted
        else lambda _, tensor: tensor
    )
    before = _perplexity(settings, settings.model) if settings.data else None
    size = _bytes_of(base) if settings.random_weights else _file_bytes(base.path)

    def write_more(folder: Path) -> None:
        figures = {
            "bits": settings.bits,
            "bytes_before": size,
            "bytes_after": _file_bytes(folder),
            "quantised": encoding.quantised if encoding else 0,
            "perplexity_before": before,
        }
        parameters, output = settings.model_dump(), settings.output
        write_summary(
            folder, "quantize", parameters, started=started, metrics=figures, output_path=output
        )
        durable.write_text(folder / "README.md", _readme(settings, base, adapted, figures))

    written = write_directory(
        source, settings.output, transform, dtype, settings.max_shard_size, write_more, encoding
    )
    measured: dict[str, float] = {}
    if before is not None:
        after = _perplexity(settings, str(settings.output), adapter=False)
        measured = {"perplexity_before": before, "perplexity_after": after}
    return QuantizeResult(
        written,
        settings.bits,
        encoding.quantised if encoding else 0,
        encoding.copied if encoding else 0,
        size,
        _file_bytes(settings.output),
        measured,
        publish_folder(where, settings.output, settings.model),
    )


def _sixteen_bits(source: ModelSource) -> torch.dtype:
    """float16 where that is what most of the model is in, else bfloat16."""
    kinds = [source.dtype(name) for name in source.names()]
    half = sum(kind == torch.float16 for kind in kinds)
    return torch.float16 if half * 2 > len(kinds) else torch.bfloat16


def _fate(source: ModelSource, encoding: Encoding | None) -> Fate:
    """What becomes of each weight of a source that is quantised itself."""

    def fate(name: str) -> str:
        if encoding is not None and encoding.keeps(name):
            return STAYS
        anew = encoding is not None and encoding.encodes(name)
        end = f"quantised to {encoding.form}" if encoding and anew else "written dense"
        return f"are decoded and {end}" if source.stored_as(name) else f"are {end}"

    return fate


def _say_experts(source: ModelSource, bits: int) -> None:
    count = sum(".mlp.experts." in name for name in source.names())
    if count:
        log.warning(
            "the experts (%d tensors) stay in 16 bits: transformers reads no %d-bit experts. "
            "Training with --method qlora quantises them as it loads, and engine export gguf "
            "writes them quantised", count, bits,
        )  # fmt: skip


def _perplexity(settings: QuantizeSettings, model: str, adapter: bool = True) -> float:
    given: dict[str, Any] = {"data": settings.data, "limit_rows": settings.limit_rows}
    given["query"] = settings.query
    given["adapter"] = settings.adapter if adapter else ()
    return evaluate_with(EvalSettings(model=model, **given)).perplexity


def _require_tokenizer(settings: QuantizeSettings) -> None:
    if settings.random_weights and settings.data:
        raise ConfigError("--data reads rows; random weights have no tokenizer for them.")


def _bytes_of(source: ModelSource) -> int:
    """Bytes of all tensors."""
    return sum(
        source.dtype(name).itemsize * torch.Size(source.shape(name)).numel()
        for name in source.names()
    )


def _file_bytes(path: Path) -> int:
    """Bytes of the weights' files."""
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files)


def _readme(
    settings: QuantizeSettings,
    base: ModelSource,
    adapted: AdaptedSource | None,
    figures: dict[str, Any],
) -> str:
    how = {4: "NF4 with double quantisation", 8: "8-bit rows"}.get(settings.bits)
    tags = (*(("merged",) if adapted else ()), *(("bitsandbytes",) if how else ("16-bit",)))
    before = figures["perplexity_before"]
    facts = {
        "base weights": "random, to measure" if settings.random_weights else None,
        "base digest": base.digest(),
        "weights": f"{how}, in the format of bitsandbytes" if how else "16 bits",
        "bytes of the weights": f"{figures['bytes_after']:,}, of {figures['bytes_before']:,}",
        "perplexity before, on rows of its maker": None if before is None else f"{before:.4f}",
    }
    paths = adapted.adapter.paths if adapted else ()
    return model_readme(settings.model, named_adapters(paths, settings.adapter), tags, facts)
