"""SmolLM3: every fourth layer does not rotate q and k (NoPE).

`no_rope_layers` holds 1 for a layer that rotates. Source: Yang et al. 2025 (RoPE to NoRoPE and
back again, arXiv 2501.18795).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from models.families.family import Family
from models.families.json_values import boolean, integer


def _rotating(raw: Mapping[str, Any], layers: int) -> tuple[bool, ...]:
    named = raw.get("no_rope_layers")
    if named is None:
        every = integer(raw, "no_rope_layer_interval", default=4)
        return tuple((layer + 1) % every != 0 for layer in range(layers))
    if (
        not isinstance(named, list | tuple)
        or len(named) < layers
        or any(value not in (0, 1) for value in named)
    ):
        raise ValueError(f"no_rope_layers is {named!r}; expected at least {layers} times 0 or 1")
    return tuple(bool(value) for value in named[:layers])


def _fields(raw: Mapping[str, Any], layers: int) -> dict[str, Any]:
    return {
        "rope_layers": _rotating(raw, layers),
        "attention_output_bias": boolean(raw, "attention_bias", False),
        "mlp_bias": boolean(raw, "mlp_bias", False),
    }


def _slides(raw: Mapping[str, Any], layer: int) -> bool:
    return not _rotating(raw, integer(raw, "num_hidden_layers"))[layer]


FAMILY = Family(
    ("smollm3",),
    _fields,
    keys=frozenset({"no_rope_layers", "no_rope_layer_interval"}),
    rope_theta=2_000_000.0,
    sliding=_slides,
    tied=True,
)
