"""Qwen1.5, Qwen2 and Qwen2.5: biases on q, k, v; late layers slide."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from models.families.family import Family
from models.families.json_values import integer


def _fields(raw: Mapping[str, Any], layers: int) -> dict[str, Any]:
    return {"attention_bias": True}


def late_layers_slide(raw: Mapping[str, Any], layer: int) -> bool:
    """The window is for layers from `max_window_layers` on, which is 28 unless it is given."""
    return layer >= integer(raw, "max_window_layers", default=28)


FAMILY = Family(("qwen2",), _fields, sliding=late_layers_slide, default_window=4096)
