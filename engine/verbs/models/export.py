"""engine export: models and adapters for other programs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from engine.config.settings import given_settings
from engine.config.tasks.inference import ExportAdapterSettings, ExportGGUFSettings
from engine.data.dataset import load_rows
from engine.data.sources.resolve import data_files
from engine.errors import ConfigError
from engine.exporting.gguf_adapter import write_gguf_adapter
from engine.exporting.gguf_file import WrittenGGUF, write_gguf
from engine.exporting.gguf_importance import measured_importance
from engine.exporting.gguf_types import FLOATS
from engine.exporting.modelfile import modelfile
from engine.exporting.portable_adapter import write_as_it_is, write_portable
from engine.exporting.publish import destination, publish_folder, publish_gguf
from engine.memory.random_model import open_base
from engine.model_sources.adapter.peft import load_adapter
from engine.model_sources.adapter_path import adapter_path
from engine.model_sources.quantised.fates import say_decoded
from engine.storage import durable


def export_gguf(settings: ExportGGUFSettings | None = None, **options: Any) -> WrittenGGUF:
    """Write a model, or an adapter of it, as a GGUF file for llama.cpp and Ollama.

    The settings are given whole, or one by one as `options`. Raises `ConfigError` for what
    llama.cpp has no form of or an occupied output, `CheckpointError` for files that are damaged.
    """
    settings = given_settings(ExportGGUFSettings, settings, options)
    where, target = destination(settings), settings.output.parent / "Modelfile"
    durable.sweep_leftovers(settings.output)
    if settings.modelfile:
        if settings.adapter is not None:
            raise ConfigError("--modelfile is for a model: leave it out beside --adapter.")
        durable.refuse_occupied(target)
    _require_blocks(settings)
    if settings.random_weights and settings.calibration:
        raise ConfigError("--calibration reads rows; random weights have no tokenizer for them.")
    adapter = None if settings.adapter is None else load_adapter(adapter_path(settings.adapter))
    source = open_base(settings.model, settings.random_weights)
    if adapter is not None:
        pairs = write_gguf_adapter(source, adapter, settings.output)
        size = settings.output.stat().st_size
        sent = publish_gguf(where, [settings.output], settings.model)
        return WrittenGGUF([settings.output], pairs, size, {"f32": 2 * pairs}, sent)
    durable.refuse_occupied(settings.output)
    importance = {}
    if settings.calibration:
        chosen = load_rows(list(settings.calibration), query=settings.query)
        rows = chosen[: settings.calibration_rows]
        importance = measured_importance(source, rows, settings.device)
    say_decoded(source, f"written as {settings.type}")

    def write_modelfile(folder: Path, first: str) -> None:
        durable.write_text(folder / target.name, modelfile(source, first))

    written = write_gguf(
        source, settings.output, settings.type,
        importance=importance, max_file_size=settings.max_file_size,
        more=write_modelfile if settings.modelfile else None,
    )  # fmt: skip
    files = [*written.files, *([target] if settings.modelfile else [])]
    return replace(written, pushed=publish_gguf(where, files, settings.model))


def _require_blocks(settings: ExportGGUFSettings) -> None:
    """Raise `ConfigError` for calibration rows where nothing would read what they measure."""
    if not settings.calibration:
        return
    data_files(settings.calibration, settings.query)
    if settings.adapter is not None:
        raise ConfigError("--calibration is for a model: leave it out beside --adapter.")
    if settings.type in (*FLOATS, "q8_0"):
        raise ConfigError(
            f"--calibration has no use for --type {settings.type}, whose scales span each block. "
            "Leave it out, or take one of fewer bits, such as q4_k_m."
        )


@dataclass(frozen=True)
class PortableAdapter:
    """`notes` say what each program needs to load it; `pushed` is the address of the upload."""

    notes: list[str]
    pushed: str | None = None


def export_adapter(
    settings: ExportAdapterSettings | None = None, **options: Any
) -> PortableAdapter:
    """Write an adapter in the one form that all programs compute alike, or as it is.

    What its run left beside it (the tokenizer, the base, the ends of answers) goes along. Raises
    `ConfigError` for what some programs refuse of the portable form (DoRA, biases, whole modules)
    or an occupied output, `CheckpointError` for files that are damaged.
    """
    settings = given_settings(ExportAdapterSettings, settings, options)
    where = destination(settings)
    write = write_portable if settings.portable else write_as_it_is
    notes = write(load_adapter(adapter_path(settings.adapter)), settings.output)
    return PortableAdapter(notes, publish_folder(where, settings.output))
