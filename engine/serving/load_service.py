"""Load a model and its adapters into a service."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

from engine.config.tasks.inference import Machine, OneModel
from engine.config.tasks.serving import ServeSettings
from engine.device import resolve_device
from engine.errors import ConfigError
from engine.inference.batched import BatchedGenerator
from engine.inference.generation import stop_ids_of
from engine.inference.loading import load_decoder, require_same_words, say_bases
from engine.model_sources.adapter_path import adapter_path
from engine.model_sources.interface.model_source import ModelSource
from engine.model_sources.open import open_model_source
from engine.serving.model_thread import ModelThread
from engine.serving.service import Bounds, Loaded, ServedModel, Service
from engine.storage.home import expanded
from engine.tokenization.tokenizer import Tokenizer, load_tokenizer

log = logging.getLogger(__name__)


def named_adapters(settings: ServeSettings) -> dict[str, Path]:
    """The adapters to serve, by the names that requests call them.

    Raises `ConfigError` or `CheckpointError` for one that is not there, and for a name given twice.
    """
    adapters: dict[str, Path] = {}
    for text in settings.adapter:
        name, sign, path = text.partition("=")
        if not sign or "/" in name:
            name, path = "", text
        folder = adapter_path(path)
        if not name:
            own = folder.parent if folder.name == "adapter" else folder
            name = own.resolve().name
        if name in adapters:
            raise ConfigError(
                f"Two adapters are named {name!r}: {adapters[name]} and {folder}. Name them apart: "
                f"--adapter NAME={folder}."
            )
        adapters[name] = folder
    return adapters


def base_model_name(settings: ServeSettings) -> str:
    """What requests call the model: the name that was given, else a folder's, file's or hub id."""
    if settings.name is not None:
        return settings.name
    path = expanded(settings.model)
    if not path.exists():
        return settings.model  # a hub id
    return path.stem if path.is_file() else path.resolve().name


def load_service(settings: ServeSettings) -> Service:
    """Load what `settings` name; the service's thread is not started yet.

    Raises `ConfigError` or `CheckpointError` naming what cannot be used.
    """
    resolve_device(settings.device)  # refused before any file is read
    adapters, name = named_adapters(settings), base_model_name(settings)
    if name in adapters:
        raise ConfigError(
            f"The model and an adapter are both named {name!r}; give the model a --name, or the "
            "adapter another one: --adapter NAME=PATH."
        )
    source = open_model_source(settings.model)
    tokenizer = load_tokenizer(source)
    require_same_words(tokenizer, adapters.values())
    machine = {name: getattr(settings, name) for name in Machine.model_fields}
    decoder = load_decoder(source, OneModel(model=settings.model, **machine))
    generator = BatchedGenerator(
        decoder,
        tokenizer,
        slots=settings.max_running,
        cache_tokens=settings.max_cache_tokens,
    )
    say_bases(adapters.values(), source, settings.quantize)
    for adapter, folder in adapters.items():
        generator.add_adapter(adapter, folder, source)
    loaded = Loaded(
        tokenizer=tokenizer,
        vocabulary=decoder.config.vocab_size,
        models=_models(source, tokenizer, name, adapters),
        generation_config=source.generation_config,
        template_kwargs=settings.chat_template_kwargs,
    )
    context = decoder.config.max_position_embeddings
    bounds = Bounds(
        context=min(settings.max_context or context, context),
        answer=settings.max_tokens,
        seconds=settings.request_timeout,
    )
    service = Service(loaded, ModelThread(generator, settings.max_waiting), bounds)
    service.sampling({})  # refuses a generation_config.json that cannot be used
    return service


def _models(
    source: ModelSource, tokenizer: Tokenizer, name: str, adapters: Mapping[str, Path]
) -> list[ServedModel]:
    own = [ServedModel(name, None, stop_ids_of(source, tokenizer))]
    return own + [
        ServedModel(adapter, adapter, stop_ids_of(source, tokenizer, path))
        for adapter, path in adapters.items()
    ]
