"""`ModelConfig`: a decoder's `config.json`, read strictly.

Fields carry Hugging Face's names. Both spellings are read: transformers 4 (`rope_theta`,
`rope_scaling`, `torch_dtype`) and transformers 5 (`rope_parameters`, `dtype`). A key that no
supported family defines is an error, because a key that is silently ignored is a model that is
silently wrong; keys known to change nothing about the arithmetic are listed in `IGNORED_KEYS`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

# Keys of `PretrainedConfig` and of hub repositories that do not change logits or the loss.
_IGNORED = (
    "architectures attention_dropout auto_map bad_words_ids begin_suppress_tokens "
    "chunk_size_feed_forward cross_attention_hidden_size decoder_start_token_id "
    "diversity_penalty do_sample dtype early_stopping encoder_no_repeat_ngram_size "
    "exponential_decay_length_penalty finetuning_task forced_bos_token_id forced_eos_token_id "
    "hidden_dropout id2label initializer_range is_decoder is_encoder_decoder is_llama_config "
    "label2id length_penalty max_length min_length mlp_dropout model_max_length "
    "no_repeat_ngram_size num_beam_groups num_beams num_return_sequences output_attentions "
    "output_hidden_states output_scores prefix pretraining_tp problem_type pruned_heads "
    "remove_invalid_values repetition_penalty resid_pdrop return_dict return_dict_in_generate "
    "rope_interleaved sep_token_id suppress_tokens task_specific_params temperature "
    "tf_legacy_loss tie_encoder_decoder tokenizer_class top_k top_p torch_dtype torchscript "
    "transformers_version transformers.js_config typical_p use_bfloat16 use_cache "
    "add_cross_attention name_or_path model_name quantization bos_token eos_token pad_token "
    "logits_to_keep "
)
IGNORED_KEYS = frozenset(_IGNORED.split())
MODEL_TYPES = ("llama", "qwen2", "qwen3", "mistral")
ROPE_TYPES = ("default", "linear", "llama3", "yarn")
LAYER_TYPES = {
    "full_attention": "full_attention",
    "attention": "full_attention",
    "sliding_attention": "sliding_attention",
}
_HEAD_DIM_DEFAULT = {"qwen3": 128}
_EPS_DEFAULT = {"mistral": 1e-6, "llama": 1e-6, "qwen2": 1e-6, "qwen3": 1e-6}
_BOUNDS: dict[str, tuple[int, int]] = {
    "vocab_size": (1, 2**22),
    "hidden_size": (1, 65_536),
    "intermediate_size": (1, 2**20),
    "num_hidden_layers": (1, 1024),
    "num_attention_heads": (1, 1024),
    "num_key_value_heads": (1, 1024),
    "head_dim": (2, 1024),
    "max_position_embeddings": (1, 2**24),
}


@dataclass(frozen=True)
class ModelConfig:
    """Shape and arithmetic of one dense decoder.

    `layer_types` holds one of "full_attention" and "sliding_attention" per layer; a sliding layer
    sees `sliding_window` keys including the query's own position. `rope_parameters` always holds
    `rope_type` and `rope_theta`. `eos_token_id` is a tuple, empty where the file names none.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    max_position_embeddings: int
    tie_word_embeddings: bool
    rope_parameters: Mapping[str, Any] = field(hash=False)
    layer_types: tuple[str, ...]
    sliding_window: int | None = None
    attention_bias: bool = False
    attention_output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    bos_token_id: int | None = None
    eos_token_id: tuple[int, ...] = ()
    pad_token_id: int | None = None

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> ModelConfig:
        """Read a parsed `config.json`.

        Raises `ValueError` with one sentence that names the key, its value and what was expected.
        """
        model_type = raw.get("model_type")
        if model_type not in MODEL_TYPES:
            raise ValueError(
                f"model_type is {model_type!r}; supported are {', '.join(MODEL_TYPES)}"
            )
        _refuse_unknown_keys(raw, model_type)
        act = raw.get("hidden_act", "silu")
        if act not in ("silu", "swish"):
            raise ValueError(f"hidden_act is {act!r}; every supported family uses 'silu'")
        heads = _integer(raw, "num_attention_heads")
        kv_heads = _integer(raw, "num_key_value_heads", default=heads)
        if heads % kv_heads:
            raise ValueError(
                f"num_attention_heads is {heads}, which num_key_value_heads, {kv_heads}, does "
                "not divide"
            )
        layers = _integer(raw, "num_hidden_layers")
        window, layer_types = _layer_types(raw, model_type, layers)
        bias = model_type == "qwen2" or bool(raw.get("attention_bias", False))
        return cls(
            model_type=model_type,
            vocab_size=_integer(raw, "vocab_size"),
            hidden_size=_integer(raw, "hidden_size"),
            intermediate_size=_integer(raw, "intermediate_size"),
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=_head_dim(raw, model_type, heads),
            rms_norm_eps=_fraction(raw, "rms_norm_eps", _EPS_DEFAULT[model_type]),
            max_position_embeddings=_integer(raw, "max_position_embeddings", default=2048),
            tie_word_embeddings=_boolean(raw, "tie_word_embeddings", False),
            rope_parameters=_rope_parameters(raw),
            layer_types=layer_types,
            sliding_window=window,
            attention_bias=bias,
            attention_output_bias=bias and model_type != "qwen2",
            mlp_bias=_boolean(raw, "mlp_bias", False),
            qk_norm=model_type == "qwen3",
            bos_token_id=next(iter(_token_ids(raw, "bos_token_id")), None),
            eos_token_id=_token_ids(raw, "eos_token_id"),
            pad_token_id=next(iter(_token_ids(raw, "pad_token_id")), None),
        )

    @property
    def kv_groups(self) -> int:
        """Query heads per key/value head: query head h reads key/value head h // kv_groups."""
        return self.num_attention_heads // self.num_key_value_heads

    def window(self, layer: int) -> int | None:
        """Keys that layer `layer` sees, counting the query's own; None is all before it."""
        return self.sliding_window if self.layer_types[layer] == "sliding_attention" else None


_OWN_KEYS = {f.name for f in dataclasses.fields(ModelConfig)} | {
    "hidden_act",
    "rope_theta",
    "rope_scaling",
    "original_max_position_embeddings",
    "partial_rotary_factor",
    "use_sliding_window",
    "max_window_layers",
    "quantization_config",
}


def _refuse_unknown_keys(raw: Mapping[str, Any], model_type: str) -> None:
    unknown = sorted(
        key
        for key in raw
        if key not in _OWN_KEYS
        and key not in IGNORED_KEYS
        and not key.startswith(("_", "unsloth_"))
    )
    if unknown:
        raise ValueError(
            f"keys that a {model_type} model does not define: {', '.join(unknown)}; "
            "remove them if they change nothing about the model's arithmetic"
        )


def _integer(raw: Mapping[str, Any], key: str, default: int | None = None) -> int:
    value = raw.get(key)
    if value is None:
        value = default
    low, high = _BOUNDS[key]
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ValueError(f"{key} is {value!r}; expected an integer from {low} to {high}")
    return value


def _boolean(raw: Mapping[str, Any], key: str, default: bool) -> bool:
    value = raw.get(key, default)
    if not isinstance(value, bool):
        raise ValueError(f"{key} is {value!r}; expected true or false")
    return value


def _fraction(raw: Mapping[str, Any], key: str, default: float) -> float:
    value = raw.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1:
        raise ValueError(f"{key} is {value!r}; expected a number between 0 and 1")
    return float(value)


def _positive(values: Mapping[str, Any], key: str, default: float | None = None) -> float:
    value = values.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ValueError(f"{key} is {value!r}; expected a positive finite number")
    return float(value)


def _token_ids(raw: Mapping[str, Any], key: str) -> tuple[int, ...]:
    value = raw.get(key)
    ids = value if isinstance(value, list | tuple) else [] if value is None else [value]
    for token in ids:
        if isinstance(token, bool) or not isinstance(token, int) or token < -1:
            raise ValueError(f"{key} is {value!r}; expected a token id or a list of them")
    return tuple(token for token in ids if token >= 0)


def _head_dim(raw: Mapping[str, Any], model_type: str, heads: int) -> int:
    if raw.get("head_dim") is not None or model_type in _HEAD_DIM_DEFAULT:
        dim = _integer(raw, "head_dim", default=_HEAD_DIM_DEFAULT.get(model_type))
    else:
        hidden = _integer(raw, "hidden_size")
        if hidden % heads:
            raise ValueError(
                f"hidden_size {hidden} is not divisible by num_attention_heads {heads}, "
                "and no head_dim is given"
            )
        dim = hidden // heads
    if dim % 2:
        raise ValueError(f"head_dim is {dim}; rotary embeddings need an even number")
    return dim


def _layer_types(
    raw: Mapping[str, Any], model_type: str, layers: int
) -> tuple[int | None, tuple[str, ...]]:
    window = raw.get("sliding_window")
    if model_type in ("qwen2", "qwen3") and not raw.get("use_sliding_window", False):
        window = None
    if model_type == "llama":
        window = None
    if window is not None and (type(window) is not int or window < 1):
        raise ValueError(f"sliding_window is {window!r}; expected a positive integer or null")
    named = raw.get("layer_types")
    if named is None:
        first = 0 if model_type == "mistral" else raw.get("max_window_layers", layers)
        kinds = tuple(
            "sliding_attention" if window is not None and layer >= first else "full_attention"
            for layer in range(layers)
        )
        return window, kinds
    if not isinstance(named, list | tuple) or len(named) != layers:
        raise ValueError(f"layer_types is {named!r}; expected {layers} names, one a layer")
    unknown = sorted({str(kind) for kind in named} - set(LAYER_TYPES))
    if unknown:
        raise ValueError(
            f"layer_types names {', '.join(unknown)}; supported are {', '.join(LAYER_TYPES)}"
        )
    kinds = tuple(LAYER_TYPES[kind] for kind in named)
    if "sliding_attention" in kinds and window is None:
        raise ValueError("layer_types has sliding_attention layers, but no sliding_window is set")
    return window, kinds


def _rope_parameters(raw: Mapping[str, Any]) -> dict[str, Any]:
    """The rotary parameters in transformers 5 spelling, whichever spelling the file uses.

    Precedence: `rope_parameters`, then `rope_scaling`, then top-level keys, then defaults. A
    top-level `original_max_position_embeddings` wins over a nested one, as in transformers.
    """
    nested = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    if not isinstance(nested, Mapping):
        raise ValueError(f"rope_parameters is {nested!r}; expected an object")
    if any(isinstance(value, Mapping) for value in nested.values()):
        raise ValueError("rope_parameters per layer type are not used by the supported families")
    rope = {key: value for key, value in nested.items() if value is not None and key != "type"}
    rope["rope_type"] = nested.get("rope_type", nested.get("type", "default"))
    rope.setdefault("rope_theta", raw.get("rope_theta") or 10_000.0)
    rope["rope_theta"] = _positive(rope, "rope_theta")
    if rope["rope_type"] not in ROPE_TYPES:
        raise ValueError(
            f"rope_type is {rope['rope_type']!r}; supported are {', '.join(ROPE_TYPES)}"
        )
    if rope.get("partial_rotary_factor", raw.get("partial_rotary_factor", 1.0)) != 1.0:
        raise ValueError("partial_rotary_factor is not 1.0, which no supported family uses")
    if rope["rope_type"] != "default":
        rope["factor"] = _positive(rope, "factor")
        original = raw.get("original_max_position_embeddings")
        if original is None:
            original = rope.get("original_max_position_embeddings")
        if original is None:
            original = raw.get("max_position_embeddings", 2048)
        rope["original_max_position_embeddings"] = original
        _positive(rope, "original_max_position_embeddings")
    if rope["rope_type"] == "llama3":
        low = rope["low_freq_factor"] = _positive(rope, "low_freq_factor", 1.0)
        high = rope["high_freq_factor"] = _positive(rope, "high_freq_factor", 4.0)
        if high <= low:
            raise ValueError(f"high_freq_factor {high} must be greater than low_freq_factor {low}")
    return rope
