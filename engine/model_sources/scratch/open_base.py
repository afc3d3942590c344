"""The base of a run: a pretrained model, or random weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from engine.errors import ConfigError
from engine.model_sources.adapter_path import adapter_path
from engine.model_sources.interface.model_source import (
    ModelDescription,
    ModelSource,
    TokenizerSource,
)
from engine.model_sources.open import describe_model, open_model_source
from engine.model_sources.scratch.characters import CharacterTokenizer
from engine.model_sources.scratch.fresh_model import FreshModel
from engine.model_sources.vocabulary.extended import ExtendedTokenizer
from engine.model_sources.vocabulary.folder import TOKENIZER_FILES, TokenizerFolder
from engine.model_sources.vocabulary.of_adapter import brought_words
from engine.model_sources.vocabulary.resized import NewWords, ResizedDescription, ResizedSource
from engine.model_sources.vocabulary.token_file import read_tokens
from engine.storage.home import expanded
from engine.storage.safe_files import read_json_object
from engine.tokenization.tokenizer import Tokenizer, load_tokenizer
from models.families import FAMILIES

BUILT_IN = "builtin:scratch"
"""The model of `--preset scratch`."""
CHARACTERS = "char"
"""The tokenizer of 133 ids that needs no file."""

_SHAPE: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 512,
    "initializer_range": 0.02,
    "rope_theta": 10_000.0,
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": False,
}
_ARCHITECTURES = {
    "llama": "Llama",
    "qwen2": "Qwen2",
    "qwen3": "Qwen3",
    "mistral": "Mistral",
    "smollm3": "SmolLM3",
    "qwen2_moe": "Qwen2Moe",
    "qwen3_moe": "Qwen3Moe",
    "qwen3_next": "Qwen3Next",
    "qwen3_5_text": "Qwen3_5",
    "qwen3_5_moe_text": "Qwen3_5Moe",
}
"""Model type -> the beginning of the class that other programs look for."""
_FILES_ONLY = ("quantization_config", "_name_or_path", "dtype", "torch_dtype")
"""Keys of a config.json that speak of the weights which it was published with."""


class BaseSettings(Protocol):
    """The settings of a run that say what it begins with."""

    model: str
    revision: str | None
    method: Any
    tokenizer: str | None
    seed: int
    add_tokens: Path | None
    init_adapter: Path | None


def describe_base(config: BaseSettings) -> ModelDescription:
    """What a run begins with, without weights: as `open.describe_model`, or a model from scratch.

    Raises `ConfigError` where model and tokenizer cannot be used, or do not fit each other.
    """
    if config.method == "scratch":
        return fresh_model(config)
    described = describe_model(config.model, config.revision)
    new = _new_words(config, described)
    return described if new is None else ResizedDescription(described, new)


def open_base(config: BaseSettings) -> ModelSource:
    """What a run begins with: a pretrained model's files, or a model from scratch."""
    if config.method == "scratch":
        return fresh_model(config)
    source = open_model_source(config.model, config.revision)
    new = _new_words(config, source)
    return source if new is None else ResizedSource(source, new)


def _new_words(config: BaseSettings, base: ModelDescription) -> NewWords | None:
    """The words that a run has in place of the model's: with further tokens, or an adapter's."""
    if config.add_tokens is not None:
        words = ExtendedTokenizer(base, read_tokens(config.add_tokens))
        return NewWords(words, words.known, words.size)
    if config.init_adapter is None:
        return None
    brought = brought_words(adapter_path(config.init_adapter))
    rows = base.config.vocab_size
    return None if brought is None else NewWords(brought.folder, rows, max(rows, brought.rows))


def fresh_model(config: BaseSettings) -> FreshModel:
    """The model of random weights that --model, --tokenizer and --seed describe.

    --model is `BUILT_IN`, a config.json, a folder or hub id that has one, whose weights are not
    read. --tokenizer is `CHARACTERS`, a folder or a hub id; by default the model's own. Raises
    `ConfigError`.
    """
    if config.model == BUILT_IN:
        words = _words(config.tokenizer or CHARACTERS)
        tokenizer = load_tokenizer(words)
        raw = _with_ids(_SHAPE | {"vocab_size": tokenizer.vocab_size}, tokenizer)
        return FreshModel(Path(BUILT_IN), raw, words, config.seed)
    path, raw, own, generation = _shape_of(config)
    if config.tokenizer is None:
        if own is None:
            raise ConfigError(
                f"{path} has no tokenizer beside it, so nothing says how rows become its tokens. "
                "Give --tokenizer DIR (such as one made by engine data tokenizer), or --tokenizer "
                "char for the built-in one of 133 characters."
            )
        return FreshModel(path, raw, own, config.seed, generation)
    words = _words(config.tokenizer)
    tokenizer = load_tokenizer(words)
    _check_vocabulary(raw.get("vocab_size"), tokenizer.vocab_size, path, config.tokenizer)
    return FreshModel(path, _with_ids(raw, tokenizer), words, config.seed)


def _shape_of(
    config: BaseSettings,
) -> tuple[Path, dict[str, Any], TokenizerSource | None, dict[str, Any]]:
    """Path, config.json, tokenizer if there is one, and generation_config.json of --model."""
    if config.model.startswith("builtin:"):
        raise ConfigError(f"There is no built-in model {config.model}; there is {BUILT_IN}.")
    path = expanded(config.model)
    if path.is_file() and path.suffix == ".json":
        raw, generation = read_json_object(path, ConfigError), dict[str, Any]()
        folder: TokenizerSource = TokenizerFolder(path.parent)
    else:
        described = describe_model(config.model, config.revision)
        # Not the folder itself: what else stands there speaks of weights that are not read.
        path, raw = described.path / "config.json", described.raw_config
        folder, generation = described, described.generation_config
    own = folder if folder.tokenizer_files() else None
    return path, _decoder_alone(raw), own, generation


def _decoder_alone(raw: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration of the language model alone, without what is said of published weights."""
    family = FAMILIES.get(str(raw.get("model_type")))
    text = raw.get("text_config")
    if family is not None and raw["model_type"] in family.nested and isinstance(text, Mapping):
        named = {"model_type": f"{raw['model_type']}_text"}
        tied = {k: raw[k] for k in ("tie_word_embeddings",) if k in raw}
        raw = named | dict(text) | tied
    kind = _ARCHITECTURES.get(str(raw.get("model_type")))
    classes = {"architectures": [f"{kind}ForCausalLM"]} if kind else {}
    return {key: value for key, value in raw.items() if key not in _FILES_ONLY} | classes


def _words(named: str) -> TokenizerSource:
    """The tokenizer that --tokenizer names."""
    if named == CHARACTERS:
        return CharacterTokenizer()
    path = expanded(named)
    if path.is_file():
        path = path.parent
    folder: TokenizerSource = TokenizerFolder(path) if path.is_dir() else describe_model(named)
    if not folder.tokenizer_files():
        raise ConfigError(
            f"--tokenizer {named}: there is no tokenizer; expected one of "
            f"{', '.join(TOKENIZER_FILES[:3])} in the folder, or the name {CHARACTERS}."
        )
    return folder


def _with_ids(raw: Mapping[str, Any], tokenizer: Tokenizer) -> dict[str, Any]:
    """The configuration with the ids of the tokenizer's tokens in place of its own."""
    ids = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    others = {key: value for key, value in raw.items() if key not in ids}
    return others | {name: index for name, index in ids.items() if index is not None}


def _check_vocabulary(size: object, needed: int, path: Path, tokenizer: str) -> None:
    """Raise `ConfigError` where the tokenizer has ids that the model has no rows for."""
    if isinstance(size, int) and size < needed:
        raise ConfigError(
            f"{path} has a vocabulary of {size} and the tokenizer {tokenizer} {needed} ids. Set "
            f"vocab_size to {needed} or more in a copy of the config.json, or give another "
            "--tokenizer."
        )
