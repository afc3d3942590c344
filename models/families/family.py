"""`Family`: what sets a model type apart from the plain dense decoder."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any


def no_fields(raw: Mapping[str, Any], layers: int) -> dict[str, Any]:
    """Nothing beyond the plain dense decoder."""
    return {}


@dataclass(frozen=True)
class Family:
    """One or more values of `model_type` that share a graph.

    `keys` are those of `config.json` that only this family has, and `ignored` those that change
    nothing; `fields(raw, layers)` turns them into fields of
    `models.config.model_config.ModelConfig` that differ from its defaults. `head_dim` is the
    default where the file gives none (None: hidden_size / num_attention_heads), `rope_theta` and
    `partial_rotary` those of the rotary embedding (None: the family rotates whole heads).
    `sliding(raw, layer)` says whether a layer has the window where the file names no `layer_types`,
    `default_window` how many keys where it does not say; `window_switch` means that
    `use_sliding_window` must turn windows on, and `uniform_window` that no layer is without one.
    `nested` model types keep the decoder in `text_config`; tensors whose names begin with one of
    `carried` belong to other parts of the model (vision, multi-token prediction) and are kept as
    they are. `fused_experts` says how the hub's files hold a mixture, `fused_adapters` whether PEFT
    knows adapters of its experts in the fused form alone, and `tied` is the default of
    `tie_word_embeddings`.
    """

    model_types: tuple[str, ...]
    fields: Callable[[Mapping[str, Any], int], dict[str, Any]] = no_fields
    keys: frozenset[str] = frozenset()
    ignored: frozenset[str] = frozenset()
    head_dim: int | None = None
    rope_theta: float = 10_000.0
    partial_rotary: float | None = None
    sliding: Callable[[Mapping[str, Any], int], bool] | None = None
    default_window: int | None = None
    window_switch: bool = True
    uniform_window: bool = False
    nested: tuple[str, ...] = ()
    carried: tuple[str, ...] = ()
    fused_experts: bool = False
    fused_adapters: bool = False
    tied: bool = False
