"""Mistral 7B and its descendants: a sliding window on every layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from models.families.family import Family


def _fields(raw: Mapping[str, Any], layers: int) -> dict[str, Any]:
    return {"attention_bias": False}  # whatever the file says, as in transformers


FAMILY = Family(
    ("mistral",),
    _fields,
    sliding=lambda raw, layer: True,
    default_window=4096,
    window_switch=False,
    uniform_window=True,
)
