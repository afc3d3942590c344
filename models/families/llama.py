"""Llama 2 to 3.3, SmolLM and others: the plain dense decoder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from models.families.family import Family
from models.families.json_values import boolean


def _fields(raw: Mapping[str, Any], layers: int) -> dict[str, Any]:
    return {
        "attention_output_bias": boolean(raw, "attention_bias", False),
        "mlp_bias": boolean(raw, "mlp_bias", False),
    }


FAMILY = Family(("llama",), _fields)
