"""Qwen3: norms of every head's q and k before the rotation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from models.families.family import Family
from models.families.json_values import boolean
from models.families.qwen2 import late_layers_slide


def _fields(raw: Mapping[str, Any], layers: int) -> dict[str, Any]:
    return {"qk_norm": True, "attention_output_bias": boolean(raw, "attention_bias", False)}


FAMILY = Family(("qwen3",), _fields, head_dim=128, sliding=late_layers_slide, default_window=4096)
