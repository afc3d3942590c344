"""Mistral 7B and its descendants: every layer has the sliding window, if there is one."""

from __future__ import annotations

from models.families.family import Family
from models.families.llama import FAMILY as LLAMA

FAMILY = Family(("mistral",), LLAMA.fields, sliding=lambda raw, layer: True, window_switch=False)
