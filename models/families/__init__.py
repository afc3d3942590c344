"""The model families: one file each, and a name in this list."""

from __future__ import annotations

from models.families import llama, mistral, qwen2, qwen3, qwen3_5, qwen3_next, qwen_moe, smollm3
from models.families.family import Family

FAMILIES: dict[str, Family] = {
    model_type: family
    for family in (
        llama.FAMILY,
        qwen2.FAMILY,
        qwen3.FAMILY,
        mistral.FAMILY,
        smollm3.FAMILY,
        qwen_moe.QWEN2_MOE,
        qwen_moe.QWEN3_MOE,
        qwen3_next.FAMILY,
        qwen3_5.QWEN3_5,
        qwen3_5.QWEN3_5_MOE,
    )
    for model_type in family.model_types
}
