"""Qwen3-Next: Gated DeltaNet, gated attention in every fourth layer, and mixtures.

Norms are zero-centred (1 + w), a quarter of every head is rotated, and q_proj gives each head a
gate beside its query. Source: the model card of Qwen3-Next-80B-A3B; Yang et al. 2024 (Gated Delta
Networks, arXiv 2412.06464).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from models.families.family import Family
from models.families.json_values import boolean, integer
from models.families.qwen_moe import SHARED_KEYS, SPARSE_KEYS, router_fields, sparse_layers

HYBRID_KEYS = frozenset(
    {
        "linear_conv_kernel_dim",
        "linear_key_head_dim",
        "linear_value_head_dim",
        "linear_num_key_heads",
        "linear_num_value_heads",
        "full_attention_interval",
    }
)
CARRIED = ("mtp.",)


def hybrid_fields(raw: Mapping[str, Any], layers: int) -> dict[str, Any]:
    """Gated attention, DeltaNet and their order: what Qwen3-Next and Qwen3.5 share."""
    fields: dict[str, Any] = {
        "qk_norm": True,
        "attention_gate": True,
        "zero_centered_norm": True,
        "attention_output_bias": boolean(raw, "attention_bias", False),
        "linear_conv_kernel_dim": integer(raw, "linear_conv_kernel_dim", default=4),
        "linear_key_head_dim": integer(raw, "linear_key_head_dim", default=128),
        "linear_value_head_dim": integer(raw, "linear_value_head_dim", default=128),
        "linear_num_key_heads": integer(raw, "linear_num_key_heads", default=16),
        "linear_num_value_heads": integer(raw, "linear_num_value_heads", default=32),
    }
    keys, values = fields["linear_num_key_heads"], fields["linear_num_value_heads"]
    if values % keys:
        raise ValueError(
            f"linear_num_value_heads is {values}, which linear_num_key_heads, {keys}, does not "
            "divide"
        )
    if raw.get("layer_types") is None:
        every = integer(raw, "full_attention_interval", default=4)
        fields["layer_types"] = tuple(
            "linear_attention" if (layer + 1) % every else "full_attention"
            for layer in range(layers)
        )
    return fields


def _fields(raw: Mapping[str, Any], layers: int) -> dict[str, Any]:
    return {
        **hybrid_fields(raw, layers),
        "linear_joint_projections": True,
        "sparse_layers": sparse_layers(raw, layers),
        "shared_expert_intermediate_size": integer(
            raw, "shared_expert_intermediate_size", default=512
        ),
        **router_fields(raw, experts=512, chosen=10, width=512, renormalise=True),
    }


FAMILY = Family(
    ("qwen3_next",),
    _fields,
    keys=SPARSE_KEYS | SHARED_KEYS | HYBRID_KEYS,
    head_dim=256,
    partial_rotary=0.25,
    carried=CARRIED,
)
