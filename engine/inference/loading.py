"""Load a model and its adapter as a verb's settings ask."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from engine.config.choices import Quantization
from engine.config.given_adapters import WeightedPath
from engine.config.tasks.inference import GenerateSettings, OneModel
from engine.config.tasks.quantizing import MergeSettings, QuantizeSettings
from engine.device import resolve_device, resolve_dtype
from engine.errors import ConfigError
from engine.model_sources.adapter.provenance import base_name, say_base
from engine.model_sources.adapter_path import adapter_path
from engine.model_sources.interface.model_source import ModelSource
from engine.model_sources.interface.stops import adapter_stops
from engine.model_sources.load_model import adapted, attach_adapter, build_model
from engine.model_sources.quantised.fates import say_loaded
from engine.model_sources.quantised.stored_codes import used_weights
from models.decoder import Decoder
from models.memory.lasting import keep_decoded
from models.named_adapters import attach_named

GivenAdapter = Path | str | tuple[WeightedPath, ...]
"""A saved adapter, or several with weights, which are added up."""


def check_adapter(settings: OneModel | MergeSettings | QuantizeSettings) -> None:
    """Raises `CheckpointError` or `ConfigError` where an adapter of `settings` is not there."""
    for path, _ in settings.adapter:
        adapter_path(path)


def load_named_adapter(
    model: Decoder, source: ModelSource, name: str, adapter: GivenAdapter
) -> frozenset[int]:
    """Put a saved adapter on `model`, which was built from `source`, under a name for requests.

    Returns the token ids that end an answer besides those of the model. Raises `CheckpointError`
    where the adapter does not fit, and `ConfigError` for one that changes more than the layers'
    projections, which the model's other requests share.
    """
    both = adapted(source, adapter)
    if both.folded or both.config != source.config:
        raise ConfigError(
            f"the adapter {both.adapter.path} changes tensors besides its low-rank pairs (biases, "
            "embeddings, copies of modules or the base's own weights), which other requests read; "
            "load it alone as the model's --adapter, or merge it and serve the merged model"
        )
    attach_named(model, name, both.pairs, both.scales)
    return frozenset(stop for path in both.adapter.paths for stop in adapter_stops(path))


def say_bases(
    adapters: Iterable[Path],
    source: ModelSource,
    quantize: Quantization | None,
    double_quant: bool = True,
) -> None:
    """Warn where an adapter was trained on other weights than those that `quantize` makes."""
    used = base_name(*used_weights(source, quantize, double_quant))
    digest = source.digest()
    for path in adapters:
        say_base(path, used, "--quantize chooses the base, as training had it", digest)


def load_decoder(
    source: ModelSource, settings: OneModel, *, double_quant: bool = True, head_8bit: bool = False
) -> Decoder:
    """The weights of `source` on the device of `settings`, quantised and adapted as asked.

    `double_quant` and `head_8bit` are as in `build_model`.

    Raises `ConfigError` or `CheckpointError` naming what cannot be used.
    """
    device = resolve_device(settings.device)
    say_loaded(source, settings.quantize)
    both = adapted(source, settings.adapter) if settings.adapter else None
    if both is not None:
        say_bases(both.adapter.paths, source, settings.quantize, double_quant)
    decoder = build_model(
        both or source,
        quantization=settings.quantize,
        double_quant=double_quant,
        head_8bit=head_8bit,
        device=device,
        dtype=resolve_dtype(settings.dtype, device),
    )
    if both is not None:
        attach_adapter(decoder, both)
    if isinstance(settings, GenerateSettings) and settings.keep_decoded:
        keep_decoded(decoder.layers, decoder.dtype)
    return decoder
