"""`engine generate`: an answer to a prompt."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from engine.config.tasks.inference import GenerateSettings
from engine.device import resolve_device
from engine.inference.generation import GenerateResult, complete, prompt_ids, stop_ids_of
from engine.inference.loading import check_adapter, load_decoder
from engine.inference.sampling import resolve_sampling
from engine.model_sources.adapter_path import adapter_path
from engine.model_sources.open import open_model_source
from engine.tokenization.tokenizer import load_tokenizer
from engine.training.determinism import deterministic


def generate(
    model: str | Path, prompt: str, adapter: str | Path | None = None, **options: Any
) -> GenerateResult:
    """Answer one prompt. `options` are the other settings of `GenerateSettings`.

    Raises as `answer`.
    """
    given: dict[str, Any] = {"model": model, "prompt": prompt, "adapter": adapter}
    return answer(GenerateSettings(**given, **options))


def answer(
    settings: GenerateSettings, on_text: Callable[[str], None] | None = None
) -> GenerateResult:
    """Answer the prompt of `settings`; with `raw` its text goes on without the chat template.

    Sampling settings that were not given are those of the model's generation_config.json.

    `on_text` takes every new piece of the answer as it comes.

    Raises `ConfigError` for a prompt that does not fit, `CheckpointError` for a model that cannot
    be read.
    """
    device = resolve_device(settings.device)  # refused before any file is read
    check_adapter(settings)
    source = open_model_source(settings.model)
    tokenizer = load_tokenizer(source)
    adapters = [adapter_path(path) for path, _ in settings.adapter]
    kwargs = settings.chat_template_kwargs
    sampling, line = resolve_sampling(settings, source.generation_config, str(source.path))
    with deterministic(device, settings.deterministic):
        result = complete(
            load_decoder(source, settings),
            tokenizer,
            prompt_ids(tokenizer, settings.prompt, settings.system, settings.raw, kwargs),
            max_new_tokens=settings.max_new_tokens,
            stop_ids=stop_ids_of(source, tokenizer, *adapters),
            stop=settings.stop,
            sampling=sampling,
            on_text=on_text,
        )
    return replace(result, sampling=line)
