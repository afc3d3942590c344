"""Write config.json so that old and new readers agree.

transformers 5 reads `rope_parameters` and `dtype`; transformers 4, llama.cpp's converter and many
others read `rope_theta`, `rope_scaling`, `partial_rotary_factor` and `torch_dtype`, and take a
default in silence where they are missing. Both spellings are written, with one meaning.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from models.config.model_config import ModelConfig

_ONLY_NEW = ("rope_theta", "partial_rotary_factor")
_EXPERTS = ("num_experts", "num_local_experts")


def complete_config(
    raw: Mapping[str, Any], config: ModelConfig, stored: torch.dtype
) -> dict[str, Any]:
    """The config.json of a model whose weights are written in `stored`.

    `raw` is the parsed file of the source, whose other keys stay, and `config` what was read of it.
    A `quantization_config` does not stay: what is written is not quantised.
    """
    result = {key: value for key, value in raw.items() if key != "quantization_config"}
    result |= {"dtype": _name(stored), "torch_dtype": _name(stored)}
    result["tie_word_embeddings"] = config.tie_word_embeddings
    decoder = raw.get("text_config") if config.nested else None
    if not isinstance(decoder, Mapping):
        return result | _decoder_keys(raw, config)
    text = dict(decoder) | _decoder_keys(decoder, config)
    text |= {"dtype": _name(stored), "tie_word_embeddings": config.tie_word_embeddings}
    return result | {"text_config": text}


def _decoder_keys(raw: Mapping[str, Any], config: ModelConfig) -> dict[str, Any]:
    """The keys that have two spellings, in both."""
    keys = _rotary_keys(raw, config)
    if config.num_experts:
        keys |= dict.fromkeys(_EXPERTS, config.num_experts)
    return keys


def _rotary_keys(raw: Mapping[str, Any], config: ModelConfig) -> dict[str, Any]:
    """Notes in the source's own objects, such as `mrope_section`, stay."""
    notes: dict[str, Any] = {}
    for key in ("rope_scaling", "rope_parameters"):
        value = raw.get(key)
        notes |= dict(value) if isinstance(value, Mapping) else {}
    notes.pop("type", None)
    new = notes | dict(config.rope_parameters)
    old = {key: value for key, value in new.items() if key not in _ONLY_NEW}
    keys = {key: new[key] for key in _ONLY_NEW if key in new}
    scaled = old["rope_type"] != "default" or len(old) > 1
    keys["rope_scaling"] = {"type": old["rope_type"], **old} if scaled else None
    return keys | {"rope_parameters": new}


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
