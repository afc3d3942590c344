"""`ModelConfig`: a decoder's `config.json`.

Fields carry Hugging Face's names. Both spellings are read: transformers 4 (`rope_theta`,
`rope_scaling`, `torch_dtype`) and transformers 5 (`rope_parameters`, `dtype`). A key that the
family does not read is ignored with a warning, or refused where it asks for arithmetic that this
graph does not do (`models.config.unknown_keys`); `IGNORED_KEYS` are ignored without a word.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from models.config.heads_per_layer import heads_per_layer
from models.config.rope import read_rope_parameters
from models.config.unknown_keys import judge_unknown_keys
from models.families import FAMILIES
from models.families.family import Family
from models.families.json_values import boolean, fraction, integer, listed, token_ids

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
    "sep_token_id suppress_tokens task_specific_params temperature "
    "tf_legacy_loss tie_encoder_decoder tokenizer_class top_k top_p torch_dtype torchscript "
    "transformers_version transformers.js_config typical_p use_bfloat16 use_cache "
    "add_cross_attention name_or_path model_name quantization bos_token eos_token pad_token "
    "logits_to_keep max_sequence_length unk_token_id num_labels neftune_noise_alpha "
)
IGNORED_KEYS = frozenset(_IGNORED.split())
MODEL_TYPES = tuple(FAMILIES)
LAYER_TYPES = {
    "full_attention": "full_attention",
    "attention": "full_attention",
    "sliding_attention": "sliding_attention",
    "linear_attention": "linear_attention",
    "mamba": "linear_attention",
}
# Beside `text_config`, in the file of a model that has more than a decoder.
_AROUND = (
    "text_config vision_config image_token_id video_token_id vision_start_token_id "
    "vision_end_token_id tie_word_embeddings model_type"
)
_AROUND_TEXT = frozenset(_AROUND.split())


@dataclass(frozen=True)
class ModelConfig:
    """Shape and arithmetic of one decoder.

    `layer_types` holds one of "full_attention", "sliding_attention" and "linear_attention" (Gated
    DeltaNet) per layer; a sliding layer sees `sliding_window` keys including the query's own
    position. `rope_layers` says which layers rotate q and k, `sparse_layers` which are mixtures of
    experts. `rope_parameters` always holds `rope_type` and `rope_theta`. `eos_token_id` is a tuple,
    empty where the file names none. `nested` means that the decoder is a part of a larger model,
    whose file calls it `language_model`.
    Where layers differ in their numbers of heads, `num_attention_heads` and `num_key_value_heads`
    are the largest and the lists `..._per_layer` hold all; `heads` and `kv_heads` give a layer's.
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
    rope_layers: tuple[bool, ...] = ()
    sparse_layers: tuple[bool, ...] = ()
    num_experts: int = 0
    num_experts_per_tok: int = 0
    moe_intermediate_size: int = 0
    shared_expert_intermediate_size: int = 0
    norm_topk_prob: bool = False
    router_aux_loss_coef: float = 0.0
    output_router_logits: bool = False
    zero_centered_norm: bool = False
    attention_gate: bool = False
    linear_conv_kernel_dim: int = 0
    linear_key_head_dim: int = 0
    linear_value_head_dim: int = 0
    linear_num_key_heads: int = 0
    linear_num_value_heads: int = 0
    linear_joint_projections: bool = False
    nested: bool = False
    num_attention_heads_per_layer: tuple[int, ...] = ()
    num_key_value_heads_per_layer: tuple[int, ...] = ()

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> ModelConfig:
        """Read a parsed `config.json`.

        Raises `ValueError` with one sentence that names the key, its value and what was expected.
        """
        model_type = raw.get("model_type")
        if not isinstance(model_type, str) or model_type not in FAMILIES:
            given = repr(model_type) if "model_type" in raw else "missing"
            raise ValueError(f"model_type is {given}; supported are {', '.join(MODEL_TYPES)}")
        family, nested = FAMILIES[model_type], model_type in FAMILIES[model_type].nested
        if nested:
            raw = _text_config(raw, model_type)
        act = raw.get("hidden_act", "silu")
        if act not in ("silu", "swish"):
            raise ValueError(f"hidden_act is {act!r}; every supported family uses 'silu'")
        heads = integer(raw, "num_attention_heads")
        kv_heads = integer(raw, "num_key_value_heads", default=heads)
        layers = integer(raw, "num_hidden_layers")
        each, kv_each = heads_per_layer(raw, layers, (heads, kv_heads))
        if heads % kv_heads and not each:
            raise ValueError(
                f"num_attention_heads is {heads}, which num_key_value_heads, {kv_heads}, does "
                "not divide"
            )
        window, layer_types = _layer_types(raw, family, layers)
        plain: dict[str, Any] = {
            "layer_types": layer_types,
            "attention_bias": boolean(raw, "attention_bias", False),
            "rope_layers": (True,) * layers,
            "sparse_layers": (False,) * layers,
        }
        own = family.fields(raw, layers)
        if "intermediate_size" not in own:
            own["intermediate_size"] = integer(raw, "intermediate_size")
        config = cls(
            model_type=model_type,
            vocab_size=integer(raw, "vocab_size"),
            hidden_size=integer(raw, "hidden_size"),
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=_head_dim(raw, family, heads),
            rms_norm_eps=fraction(raw, "rms_norm_eps", 1e-6),
            max_position_embeddings=integer(raw, "max_position_embeddings", default=2048),
            tie_word_embeddings=boolean(raw, "tie_word_embeddings", family.tied),
            rope_parameters=read_rope_parameters(raw, family),
            sliding_window=window,
            bos_token_id=next(iter(token_ids(raw, "bos_token_id")), None),
            eos_token_id=token_ids(raw, "eos_token_id"),
            pad_token_id=next(iter(token_ids(raw, "pad_token_id")), None),
            nested=nested,
            num_attention_heads_per_layer=each,
            num_key_value_heads_per_layer=kv_each,
            **(plain | own),
        )
        known = _COMMON_KEYS | IGNORED_KEYS | family.keys | family.ignored
        unknown = [k for k in raw if k not in known and not k.startswith(("_", "unsloth_"))]
        judge_unknown_keys(raw, unknown, config)
        return config

    def heads(self, layer: int) -> int:
        """Query heads of layer `layer`: head h reads key/value head h // (heads / kv_heads)."""
        each = self.num_attention_heads_per_layer
        return each[layer] if each else self.num_attention_heads

    def kv_heads(self, layer: int) -> int:
        """Key/value heads of layer `layer`."""
        each = self.num_key_value_heads_per_layer
        return each[layer] if each else self.num_key_value_heads

    @property
    def rotary_dim(self) -> int:
        """The leading elements of a head that are rotated."""
        return int(self.head_dim * self.rope_parameters.get("partial_rotary_factor", 1.0))

    @property
    def period(self) -> int:
        """The least number of layers after which their kinds repeat."""
        kinds = [
            (kind, rotates, sparse, self.heads(layer), self.kv_heads(layer))
            for layer, (kind, rotates, sparse) in enumerate(
                zip(self.layer_types, self.rope_layers, self.sparse_layers, strict=True)
            )
        ]
        return next(
            count
            for count in range(1, len(kinds) + 1)
            if all(kind == kinds[layer % count] for layer, kind in enumerate(kinds))
        )

    def window(self, layer: int) -> int | None:
        """Keys that layer `layer` sees, counting the query's own; None is all before it."""
        return self.sliding_window if self.layer_types[layer] == "sliding_attention" else None

    def with_layers(self, count: int) -> ModelConfig:
        """The same model with `count` layers, whose kinds follow each other as here."""
        repeats = -(-count // self.num_hidden_layers)
        return replace(
            self,
            num_hidden_layers=count,
            layer_types=(self.layer_types * repeats)[:count],
            rope_layers=(self.rope_layers * repeats)[:count],
            sparse_layers=(self.sparse_layers * repeats)[:count],
            num_attention_heads_per_layer=(self.num_attention_heads_per_layer * repeats)[:count],
            num_key_value_heads_per_layer=(self.num_key_value_heads_per_layer * repeats)[:count],
        )


_COMMON = (
    "model_type vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads "
    "num_key_value_heads head_dim rms_norm_eps max_position_embeddings tie_word_embeddings "
    "rope_parameters layer_types sliding_window attention_bias mlp_bias bos_token_id eos_token_id "
    "pad_token_id hidden_act rope_theta rope_scaling original_max_position_embeddings "
    "partial_rotary_factor use_sliding_window max_window_layers quantization_config "
    "num_attention_heads_per_layer num_key_value_heads_per_layer"
)
_COMMON_KEYS = frozenset(_COMMON.split())


def _text_config(raw: Mapping[str, Any], model_type: str) -> Mapping[str, Any]:
    """The decoder's part of the file, with what the outer part says of it."""
    text = raw.get("text_config")
    if not isinstance(text, Mapping):
        raise ValueError(f"text_config is {text!r}; a {model_type} model has its decoder there")
    around = {key: value for key, value in raw.items() if key not in _AROUND_TEXT}
    shared = {key: raw[key] for key in ("tie_word_embeddings",) if key in raw}
    return around | dict(text) | shared


def _head_dim(raw: Mapping[str, Any], family: Family, heads: int) -> int:
    if raw.get("head_dim") is not None or family.head_dim is not None:
        dim = integer(raw, "head_dim", default=family.head_dim)
    else:
        hidden = integer(raw, "hidden_size")
        if hidden % heads:
            raise ValueError(
                f"hidden_size {hidden} is not divisible by num_attention_heads {heads}, "
                "and no head_dim is given"
            )
        dim = hidden // heads
    if dim % 2 or dim < 4:
        raise ValueError(f"head_dim is {dim}; rotary embeddings need an even number from 4 on")
    return dim


def _layer_types(
    raw: Mapping[str, Any], family: Family, layers: int
) -> tuple[int | None, tuple[str, ...]]:
    window = raw.get("sliding_window", family.default_window)
    slides = family.sliding
    if slides is None or (family.window_switch and not boolean(raw, "use_sliding_window", False)):
        window = None
    if window is not None and (type(window) is not int or window < 1):
        raise ValueError(f"sliding_window is {window!r}; expected a positive integer or null")
    named = raw.get("layer_types")
    if named is None:
        kinds = tuple(
            "sliding_attention"
            if window is not None and slides is not None and slides(raw, layer)
            else "full_attention"
            for layer in range(layers)
        )
        return window, kinds
    if not isinstance(named, list | tuple) or len(named) != layers:
        raise ValueError(f"layer_types is {named!r}; expected {layers} names, one a layer")
    supported = [
        kind
        for kind, meant in LAYER_TYPES.items()
        if meant != "linear_attention" or "linear_key_head_dim" in family.keys
    ]
    unknown = sorted({str(kind) for kind in named} - set(supported))
    if unknown:
        raise ValueError(
            f"layer_types names {listed(unknown)}; supported are {', '.join(supported)}"
        )
    kinds = tuple(LAYER_TYPES[kind] for kind in named)
    if "sliding_attention" in kinds and window is None:
        raise ValueError("layer_types has sliding_attention layers, but no sliding_window is set")
    if family.uniform_window and window is not None and "full_attention" in kinds:
        raise ValueError(
            f"layer_types names full_attention layers, but sliding_window is {window}, and this "
            "family has the window on every layer"
        )
    return window, kinds
