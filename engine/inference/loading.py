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
from engine.model_sources.adapter.adapted_source import AdaptedSource
from engine.model_sources.adapter.provenance import base_name, say_base
from engine.model_sources.adapter_path import adapter_path
from engine.model_sources.interface.model_source import ModelSource
from engine.model_sources.interface.stops import adapter_stops
from engine.model_sources.load_model import adapted, attach_adapter, build_model
from engine.model_sources.quantised.fates import say_loaded
from engine.model_sources.quantised.stored_codes import used_weights
from engine.model_sources.vocabulary.of_adapter import brought_words
from engine.tokenization.tokenizer import Tokenizer, load_tokenizer
from kernels.linear.int8 import Int8Weight
from kernels.nf4.weight import NF4Tensors
from models.decoder import Decoder
from models.layers.linear import Embedding, Linear
from models.memory.lasting import keep_decoded
from models.named_adapters import attach_named

GivenAdapter = Path | str | tuple[WeightedPath, ...]
"""A saved adapter, or several with weights, which are added up."""


def check_adapter(settings: OneModel | MergeSettings | QuantizeSettings) -> None:
    """Raises `CheckpointError` or `ConfigError` where an adapter of `settings` is not there."""
    for path, _ in settings.adapter:
        adapter_path(path)


def require_same_words(tokenizer: Tokenizer, adapters: Iterable[Path]) -> None:
    """Raises `ConfigError` where an adapter brings tokens that the model's `tokenizer` has not.

    Requests of several adapters are read with one tokenizer, the model's.
    """
    for path in adapters:
        brought = brought_words(path)
        more = 0 if brought is None else load_tokenizer(brought.folder).vocab_size
        if more > tokenizer.vocab_size:
            raise ConfigError(
                f"The adapter {path} brings {more - tokenizer.vocab_size} tokens of its own, and "
                "what is asked of the model and of its adapters is read with one tokenizer, the "
                "model's. Merge it and use what comes of it: engine merge --adapter "
                f"{path} --model MODEL --output FOLDER."
            )


def load_named_adapter(
    model: Decoder, source: ModelSource, name: str, adapter: GivenAdapter
) -> tuple[frozenset[int], Decoder | None]:
    """Put a saved adapter on `model`, which was built from `source`, under a name for requests.

    Returns the token ids that end an answer besides those of the model. An adapter that changes
    more than the layers' projections (`changes_more`) gets a decoder of its own, which is returned
    too; it shares with `model` what it does not change. Raises `CheckpointError` where the adapter
    does not fit.
    """
    both = adapted(source, adapter)
    stops = frozenset(stop for path in both.adapter.paths for stop in adapter_stops(path))
    if not changes_more(both):
        attach_named(model, name, both.pairs, both.scales)
        return stops, None
    return stops, _decoder_beside(model, both)


def changes_more(both: AdaptedSource) -> bool:
    """Whether an adapter changes tensors besides its low-rank pairs.

    These are biases, embeddings, copies of modules, or the base's own weights.
    """
    return both.folded > 0 or both.config != both.base.config


def _decoder_beside(model: Decoder, both: AdaptedSource) -> Decoder:
    """The adapted model in the types of `model`, whose unchanged weights it shares."""
    weights = [module.weight for module in model.layers[0].modules() if isinstance(module, Linear)]
    four_bit = next((w for w in weights if isinstance(w, NF4Tensors)), None)
    int8 = any(isinstance(weight, Int8Weight) for weight in weights)
    own = build_model(
        both,
        quantization="nf4" if four_bit is not None else "int8" if int8 else None,
        double_quant=four_bit is None or getattr(four_bit, "nested_absmax", None) is not None,
        device=model.device,
        dtype=model.dtype,
        head_8bit=isinstance(model.head_weight(), Int8Weight),
    )
    base = dict(model.named_modules())
    for path, module in own.named_modules():
        other = base.get(path)
        shared = isinstance(module, Linear | Embedding) and both.is_unchanged(path)
        if not shared or type(other) is not type(module):
            continue
        if isinstance(module, Linear) and isinstance(other, Linear):
            module.set_weight(other.weight)
        elif isinstance(module, Embedding) and isinstance(other, Embedding):
            module.set_weight(other.weight, other.device)
    attach_adapter(own, both)
    return own.requires_grad_(False)


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
