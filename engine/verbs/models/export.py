"""engine export: models and adapters for other programs."""

from __future__ import annotations

from typing import Any

from engine.config.settings import given_settings
from engine.config.tasks.inference import ExportAdapterSettings, ExportGGUFSettings
from engine.errors import ConfigError
from engine.exporting.gguf_adapter import write_gguf_adapter
from engine.exporting.gguf_file import WrittenGGUF, write_gguf
from engine.exporting.modelfile import modelfile
from engine.exporting.portable_adapter import write_portable
from engine.model_sources.adapter.peft import load_adapter
from engine.model_sources.adapter_path import adapter_path
from engine.model_sources.open import open_model_source
from engine.storage import durable


def export_gguf(settings: ExportGGUFSettings | None = None, **options: Any) -> WrittenGGUF:
    """Write a model, or an adapter of it, as a GGUF file for llama.cpp and Ollama.

    The settings are given whole, or one by one as `options`. Raises `ConfigError` for what
    llama.cpp has no form of or an occupied output, `CheckpointError` for files that are damaged.
    """
    settings = given_settings(ExportGGUFSettings, settings, options)
    target = settings.output.parent / "Modelfile"
    if settings.modelfile:
        if settings.adapter is not None:
            raise ConfigError("--modelfile is for a model: leave it out beside --adapter.")
        durable.refuse_occupied(target)
    source = open_model_source(settings.model)
    if settings.adapter is not None:
        adapter = load_adapter(adapter_path(settings.adapter))
        pairs = write_gguf_adapter(source, adapter, settings.output)
        size = settings.output.stat().st_size
        return WrittenGGUF([settings.output], pairs, size, {"f32": 2 * pairs})
    written = write_gguf(
        source, settings.output, settings.type, max_file_size=settings.max_file_size
    )
    if settings.modelfile:
        durable.write_text(target, modelfile(source, written.files[0].name))
    return written


def export_adapter(settings: ExportAdapterSettings | None = None, **options: Any) -> list[str]:
    """Write an adapter in the one form that all programs compute alike; returns notes on each.

    Raises `ConfigError` for what some of them refuse (DoRA, biases, whole modules) or an occupied
    output, `CheckpointError` for files that are damaged.
    """
    settings = given_settings(ExportAdapterSettings, settings, options)
    return write_portable(load_adapter(adapter_path(settings.adapter)), settings.output)
