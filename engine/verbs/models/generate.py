"""`engine generate`: answers to prompts."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, overload

from engine.config.tasks.inference import GenerateSettings
from engine.device import resolve_device
from engine.errors import ConfigError
from engine.inference.batch_files import (
    MODEL_DIGEST,
    PromptJob,
    answer_file,
    answer_in_order,
    refuse_other_output,
    sampled,
)
from engine.inference.batched import BatchedGenerator
from engine.inference.generation import GenerateResult, complete, prompt_ids, stop_ids_of
from engine.inference.loading import check_adapter, load_decoder
from engine.inference.request import RequestSettings
from engine.inference.sampling import resolve_sampling
from engine.model_sources.adapter_path import adapter_path
from engine.model_sources.interface.model_source import ModelSource
from engine.model_sources.open import open_model_source
from engine.model_sources.vocabulary.of_adapter import words_of
from engine.storage.durable import sha256_file
from engine.tokenization.tokenizer import Tokenizer, load_tokenizer
from engine.training.determinism import deterministic
from models.decoder import Decoder


@overload
def generate(
    model: str | Path, prompt: str, adapter: str | Path | None = None, **options: Any
) -> GenerateResult: ...


@overload
def generate(
    model: str | Path,
    prompt: None = None,
    adapter: str | Path | None = None,
    *,
    prompts: Sequence[str],
    **options: Any,
) -> list[GenerateResult]: ...


def generate(
    model: str | Path,
    prompt: str | None = None,
    adapter: str | Path | None = None,
    *,
    prompts: Sequence[str] | None = None,
    **options: Any,
) -> GenerateResult | list[GenerateResult]:
    """Answer one prompt, or `prompts` together; `options` are settings of `GenerateSettings`.

    With `num_samples` N each of `prompts` has N answers, one after another. Raises as `answer`.
    """
    given: dict[str, Any] = {"model": model, "prompt": prompt, "adapter": adapter, **options}
    if prompts is None:
        if given.get("data") is not None:
            raise ConfigError("`data` is for engine generate; give `prompts` here")
        return answer(GenerateSettings(**given))
    if prompt is not None:
        raise ConfigError("`prompt` and `prompts` were both given; give one of them")
    return answer_prompts(GenerateSettings(**given), prompts)


@dataclass(frozen=True)
class _Loaded:
    """A model with what its answers need."""

    model: Decoder
    tokenizer: Tokenizer
    request: RequestSettings
    line: str | None
    source: ModelSource

    def generator(self, settings: GenerateSettings) -> BatchedGenerator:
        return BatchedGenerator(
            self.model,
            self.tokenizer,
            slots=settings.slots,
            cache_tokens=settings.cache_tokens,
        )


def _load(settings: GenerateSettings) -> _Loaded:
    check_adapter(settings)
    source = open_model_source(settings.model)
    adapters = [adapter_path(path) for path, _ in settings.adapter]
    tokenizer = load_tokenizer(words_of(source, adapters))
    sampling, line = resolve_sampling(settings, source.generation_config, str(source.path))
    stops = stop_ids_of(source, tokenizer, *adapters)
    request = RequestSettings(settings.max_new_tokens, sampling, stops, settings.stop)
    return _Loaded(load_decoder(source, settings), tokenizer, request, line, source)


def answer(
    settings: GenerateSettings, on_text: Callable[[str], None] | None = None
) -> GenerateResult:
    """Answer the prompt of `settings`; with `raw` its text goes on without the chat template.

    Sampling settings that were not given are those of the model's generation_config.json.

    `on_text` takes every new piece of the answer as it comes.

    Raises `ConfigError` for a prompt that does not fit, `CheckpointError` for a model that cannot
    be read.
    """
    if settings.prompt is None:
        raise ConfigError("there is no prompt: give --prompt TEXT, or --data FILE --output FILE")
    device = resolve_device(settings.device)  # refused before any file is read
    with deterministic(device, settings.deterministic):
        loaded = _load(settings)
        request = loaded.request
        result = complete(
            loaded.model,
            loaded.tokenizer,
            _prompt_ids(loaded.tokenizer, settings, settings.prompt),
            max_new_tokens=request.max_new_tokens,
            stop_ids=request.stop_ids,
            stop=request.stop,
            sampling=request.sampling,
            on_text=on_text,
        )
    return replace(result, sampling=loaded.line)


def answer_prompts(settings: GenerateSettings, prompts: Sequence[str]) -> list[GenerateResult]:
    """`settings.num_samples` answers to each prompt, prompt after prompt. Raises as above."""
    device = resolve_device(settings.device)
    with deterministic(device, settings.deterministic):
        loaded = _load(settings)
        generator, samples = loaded.generator(settings), settings.num_samples
        jobs = (
            PromptJob(
                _prompt_ids(loaded.tokenizer, settings, prompt),
                sampled(loaded.request, index * samples + sample),
            )
            for index, prompt in enumerate(prompts)
            for sample in range(samples)
        )
        answers = answer_in_order(generator, jobs, 2 * generator.slots)
        return [replace(one, sampling=loaded.line) for one in answers]


def answer_rows(
    settings: GenerateSettings, on_row: Callable[[int, int], None] | None = None
) -> int:
    """Answer the rows of `settings.data` into `settings.output`; returns how many it answered.

    `on_row` takes the rows that are done and all there are. Raises as `answer`, `DataError` for a
    row that is no prompt, `ConfigError` for an output of other rows, another model or settings.
    """
    if settings.data is None or settings.output is None or settings.prompt is not None:
        raise ConfigError("give --data with --output and without --prompt, or --prompt alone")
    refuse_other_output(settings.data, settings.output)
    device = resolve_device(settings.device)
    with deterministic(device, settings.deterministic):
        loaded = _load(settings)
        generator = loaded.generator(settings)
        tokenizer, request = loaded.tokenizer, loaded.request
        facts = _facts(settings, loaded)
        return answer_file(settings, generator, tokenizer, request, facts, on_row)


def _facts(settings: GenerateSettings, loaded: _Loaded) -> dict[str, Any]:
    """What decides answers beside the settings and the rows, by names for who reads it."""
    template = "\0".join(loaded.tokenizer.chat_template.sources)
    adapters = [path for path, _ in settings.adapter]
    return {
        MODEL_DIGEST: loaded.source.digest(),
        "adapter digests": [_digest_of_folder(adapter_path(path)) for path in adapters],
        "tokenizer digest": _digest(loaded.tokenizer.serialised()),
        "template digest": _digest(template),
        "sampling": loaded.request.sampling.model_dump(mode="json"),
        "stop ids": sorted(loaded.request.stop_ids),
    }


def _digest_of_folder(adapter: Path) -> str:
    files = sorted(path for path in adapter.glob("adapter_*") if path.is_file())
    return _digest(" ".join(f"{path.name} {sha256_file(path)}" for path in files))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()


def _prompt_ids(tokenizer: Tokenizer, settings: GenerateSettings, prompt: str) -> list[int]:
    kwargs = settings.chat_template_kwargs
    return prompt_ids(tokenizer, prompt, settings.system, settings.raw, kwargs)
