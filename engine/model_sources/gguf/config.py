"""The configuration of a GGUF model, spelled as in config.json.

llama.cpp keeps a model's shape under keys such as `llama.block_count`, and Llama 3's rotary scaling
not as parameters but as its result: a tensor `rope_freqs.weight` with one divisor per rotary
frequency. `llama3_parameters` finds the parameters again,

    wavelength_i = 2 pi theta^(2i/d)
    divisor_i    = 1                            where wavelength_i < original / high
                   factor                       where wavelength_i > original / low
                   1 / ((1 - s) / factor + s)   between, with
    s            = (original / wavelength_i - low) / (high - low)

which says the same for (original, low, high) and (c original, c low, c high); low = 1 is chosen.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from engine.errors import CheckpointError, ConfigError
from engine.model_sources.gguf.config_mixtures import HYBRIDS, MIXTURES, hybrid, mixture
from engine.model_sources.gguf.metadata import Keys

_MOST_LAYERS = 1024
# llama.cpp's name -> model_type and class of transformers
ARCHITECTURES = {
    "llama": ("llama", "LlamaForCausalLM"),
    "qwen2": ("qwen2", "Qwen2ForCausalLM"),
    "qwen3": ("qwen3", "Qwen3ForCausalLM"),
    "smollm3": ("smollm3", "SmolLM3ForCausalLM"),
    "qwen2moe": ("qwen2_moe", "Qwen2MoeForCausalLM"),
    "qwen3moe": ("qwen3_moe", "Qwen3MoeForCausalLM"),
    "qwen3next": ("qwen3_next", "Qwen3NextForCausalLM"),
    "qwen35": ("qwen3_5_text", "Qwen3_5ForCausalLM"),
    "qwen35moe": ("qwen3_5_moe_text", "Qwen3_5MoeForCausalLM"),
}


def raw_config(
    metadata: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
    rope_freqs: torch.Tensor | None,
    source: str,
) -> dict[str, Any]:
    """`metadata` and the tensors' `shapes` of a GGUF file as the dict of a config.json.

    `rope_freqs` is the tensor `rope_freqs.weight`, (head_dim / 2,) fp32, or None. Raises
    `ConfigError` for an architecture or feature that is not supported, and `CheckpointError`
    where the metadata lacks a key or contradicts itself.
    """
    arch = _architecture(metadata, source)
    keys = Keys(metadata, arch, source)
    if "token_embd.weight" not in shapes or len(shapes["token_embd.weight"]) != 2:
        raise CheckpointError(f"{source} has no embedding matrix token_embd.weight.")
    model_type, name_of_class = ARCHITECTURES[arch]
    head_dim, layers = _head_dim(keys, arch), _layers(keys)
    config: dict[str, Any] = {
        "architectures": [name_of_class],
        "model_type": model_type,
        "vocab_size": shapes["token_embd.weight"][0],
        "hidden_size": keys.integer("embedding_length"),
        "num_hidden_layers": layers,
        "num_attention_heads": keys.integer("attention.head_count"),
        "num_key_value_heads": _kv_heads(keys),
        "head_dim": head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": keys.integer("context_length"),
        "rms_norm_eps": keys.number("attention.layer_norm_rms_epsilon"),
        "rope_parameters": _rope_parameters(keys, rope_freqs, head_dim),
        "tie_word_embeddings": "output.weight" not in shapes,
        "use_cache": True,
    }
    if arch in MIXTURES:
        config |= mixture(arch, keys, shapes, layers)
    if arch in HYBRIDS:
        config |= hybrid(keys, shapes, layers)
        config["rope_parameters"] |= _partial_rotation(keys, head_dim)
    if arch not in MIXTURES:
        config["intermediate_size"] = keys.integer("feed_forward_length")
    elif arch != "qwen35moe":  # which has no dense layer
        inner = config["moe_intermediate_size"]
        config["intermediate_size"] = keys.integer("feed_forward_length", inner) or inner
    for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
        config[f"{name}_token_id"] = metadata.get(f"tokenizer.ggml.{key}_token_id")
    return config | _flags(arch, shapes)


def _architecture(metadata: Mapping[str, Any], source: str) -> str:
    """llama.cpp's name of the architecture. Raises `ConfigError` for one that is not supported."""
    arch = metadata.get("general.architecture")
    if not isinstance(arch, str) or arch not in ARCHITECTURES:
        raise ConfigError(
            f"{source} holds a model of the architecture {arch!r}; of GGUF files, "
            f"{', '.join(ARCHITECTURES)} are read. Use the model's Hugging Face directory."
        )
    if arch not in MIXTURES and Keys(metadata, arch, source).integer("expert_count", 0):
        raise ConfigError(
            f"{source} holds a mixture of experts of the architecture {arch!r}, which is not "
            f"supported; of mixtures, {', '.join(MIXTURES)} are read."
        )
    return arch


def _flags(arch: str, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, bool]:
    """The biases that the tensors show, and that no attention window is used."""
    flags = {}
    biased = any(name.endswith(".attn_q.bias") for name in shapes)
    if arch == "qwen2moe":
        flags["qkv_bias"] = biased
    elif arch != "qwen2":
        flags["attention_bias"] = biased
    if arch in ("llama", "smollm3"):
        flags["mlp_bias"] = "blk.0.ffn_gate.bias" in shapes
    elif arch not in HYBRIDS:
        flags["use_sliding_window"] = False
    return flags


def _layers(keys: Keys) -> int:
    """Layers of the decoder itself: those that predict further tokens come after them."""
    layers = keys.integer("block_count") - keys.integer("nextn_predict_layers", 0)
    if not 0 <= layers <= _MOST_LAYERS:
        raise CheckpointError(f"{keys.source}: the model is said to have {layers} layers.")
    return layers


def _head_dim(keys: Keys, arch: str) -> int:
    heads = keys.integer("attention.head_count")
    if heads < 1:
        raise CheckpointError(f"{keys.source}: the number of attention heads is {heads}.")
    head_dim = keys.integer("attention.key_length", keys.integer("embedding_length") // heads)
    same = ("attention.value_length", "rope.dimension_count")
    for key in same[: 1 if arch in HYBRIDS else 2]:
        if keys.integer(key, head_dim) != head_dim:
            raise ConfigError(
                f"{keys.source}: attention heads are {head_dim} wide but {key} is "
                f"{keys.integer(key)}; only models where the two agree are supported."
            )
    return head_dim


def _partial_rotation(keys: Keys, head_dim: int) -> dict[str, Any]:
    """How much of each head is rotated, and the rows of a picture's positions."""
    rotated = keys.integer("rope.dimension_count", head_dim // 4)
    rope: dict[str, Any] = {"partial_rotary_factor": rotated / head_dim}
    sections = keys.value("rope.dimension_sections", None)
    if sections is not None:
        if not isinstance(sections, np.ndarray) or sections.dtype.kind not in "iu":
            raise ConfigError(
                f"{keys.source}: rope.dimension_sections is {str(sections)[:80]}; expected an "
                "array of integers."
            )
        rope |= {"mrope_section": sections[:3].tolist(), "mrope_interleaved": True}
    return rope


def _kv_heads(keys: Keys) -> int:
    return keys.integer("attention.head_count_kv", keys.integer("attention.head_count"))


def _rope_parameters(keys: Keys, rope_freqs: torch.Tensor | None, head_dim: int) -> dict[str, Any]:
    theta = keys.number("rope.freq_base", 10_000.0)
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": theta}
    kind = keys.value("rope.scaling.type", "none")
    if rope_freqs is not None:
        if kind not in ("none", ""):
            raise ConfigError(f"{keys.source}: rope_freqs.weight together with {kind} scaling.")
        return rope | llama3_parameters(rope_freqs, theta, head_dim, keys.source)
    old_factor = keys.number("rope.scale_linear", 1.0)
    if kind in ("none", ""):
        return rope if old_factor == 1.0 else rope | {"rope_type": "linear", "factor": old_factor}
    factor = keys.number("rope.scaling.factor", old_factor)
    if kind == "linear":
        return rope | {"rope_type": "linear", "factor": factor}
    if kind != "yarn" or keys.number("rope.scaling.yarn_ext_factor", 1.0) != 1.0:
        raise ConfigError(f"{keys.source}: rotary scaling of the type {kind!r} is not supported.")
    original = keys.integer("rope.scaling.original_context_length", keys.integer("context_length"))
    rope |= {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original}
    for name, key in (
        ("attention_factor", "yarn_attn_factor"),
        ("beta_fast", "yarn_beta_fast"),
        ("beta_slow", "yarn_beta_slow"),
    ):
        if keys.value(f"rope.scaling.{key}", None) is not None:
            rope[name] = keys.number(f"rope.scaling.{key}")
    return rope


def llama3_factors(
    theta: float, head_dim: int, factor: float, low: float, high: float, original: float
) -> torch.Tensor:
    """The divisor of each rotary frequency under Llama 3's scaling, (head_dim / 2,) fp64."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim
    wavelengths = 2 * torch.pi * theta**exponents
    smooth = (original / wavelengths - low) / (high - low)
    factors = 1 / ((1 - smooth) / factor + smooth)
    factors = torch.where(wavelengths < original / high, 1.0, factors)
    return torch.where(wavelengths > original / low, factor, factors)


def llama3_parameters(
    factors: torch.Tensor, theta: float, head_dim: int, source: str
) -> dict[str, Any]:
    """The parameters of Llama 3's scaling that give `factors`, (head_dim / 2,).

    Empty where every factor is 1. Raises `CheckpointError` if no parameters give them.
    """
    target = factors.to(torch.float64)
    if target.shape != (head_dim // 2,) or not torch.isfinite(target).all() or target.min() < 0.5:
        raise CheckpointError(
            f"{source}: rope_freqs.weight has the shape {list(target.shape)} and values from "
            f"{target.min():.3g}; expected {head_dim // 2} divisors of at least 1."
        )
    if torch.equal(target, torch.ones_like(target)):
        return {}
    for factor, high, original in _candidates(target, theta, head_dim):
        made = llama3_factors(theta, head_dim, factor, 1.0, high, original)
        if torch.allclose(made, target, rtol=1e-5, atol=0):
            return {
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": 1.0,
                "high_freq_factor": high,
                "original_max_position_embeddings": original,
            }
    raise CheckpointError(
        f"{source}: rope_freqs.weight does not follow Llama 3's formula for any parameters, so "
        "this model's rotary scaling is not known."
    )


def _candidates(
    target: torch.Tensor, theta: float, head_dim: int
) -> list[tuple[float, float, int]]:
    """(factor, high, original) to try: those in use first, then those the values between give.

    Where the divisor is between 1 and `factor`, s is linear in 1 / wavelength, so a line through
    those points has the slope original / (high - 1) and the intercept -1 / (high - 1).
    """
    top = float(target.max())
    candidates = [
        (factor, 4.0, 2**power)
        for factor in dict.fromkeys((top, 8.0, 32.0, 16.0, 4.0, 2.0))
        for power in (13, *range(4, 13), *range(14, 21))
    ]
    between = (target > 1 + 1e-6) & (target < top * (1 - 1e-6))
    if int(between.sum()) >= 2:
        exponents = torch.arange(0, head_dim, 2, dtype=torch.float64)[between] / head_dim
        inverse = 1 / (2 * torch.pi * theta**exponents)
        smooth = (1 / target[between] - 1 / top) / (1 - 1 / top)
        design = torch.stack([inverse, torch.ones_like(inverse)], dim=1)
        slope, intercept = torch.linalg.lstsq(design, smooth[:, None]).solution[:, 0].tolist()
        if slope > 0 and intercept < 0:
            high = 1 - 1 / intercept
            candidates += [
                (top, rounded, round(slope * (rounded - 1)))
                for rounded in (float(round(high)), round(high, 3))
            ]
    return candidates
