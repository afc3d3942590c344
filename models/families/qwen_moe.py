"""Qwen2-MoE and Qwen3-MoE, and what all mixtures of Qwen share.

Qwen2-MoE has biases on q, k, v and a shared expert; Qwen3-MoE has neither, but norms of q and k.
A layer is sparse unless `mlp_only_layers` names it or `decoder_sparse_step` passes over it.
Source: arXiv 2407.10671 and 2505.09388.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from models.families.family import Family
from models.families.json_values import boolean, integer, layer_indices, positive

ROUTER_KEYS = frozenset(
    {
        "num_experts",
        "num_local_experts",
        "num_experts_per_tok",
        "moe_intermediate_size",
        "norm_topk_prob",
        "router_aux_loss_coef",
        "output_router_logits",
    }
)
SPARSE_KEYS = ROUTER_KEYS | {"decoder_sparse_step", "mlp_only_layers"}
_MOST_EXPERTS = 65_536
"""In all layers: every one has a name of its own in most files, which are listed before reading."""
SHARED_KEYS = frozenset({"shared_expert_intermediate_size"})


def router_fields(
    raw: Mapping[str, Any], experts: int, chosen: int, width: int, renormalise: bool
) -> dict[str, Any]:
    """The fields of a router; the four values are the family's defaults."""
    both = [raw[key] for key in ("num_experts", "num_local_experts") if raw.get(key) is not None]
    if len(both) > 1 and both[0] != both[1]:
        raise ValueError(f"num_experts is {both[0]!r}, but num_local_experts is {both[1]!r}")
    count = integer({"num_experts": both[0] if both else experts}, "num_experts")
    layers = integer(raw, "num_hidden_layers")
    if layers * count > _MOST_EXPERTS:
        raise ValueError(
            f"num_hidden_layers is {layers} and num_experts {count}; at most {_MOST_EXPERTS} "
            "experts in all layers are read, twice as many as any published model has"
        )
    per_token = integer(raw, "num_experts_per_tok", default=chosen)
    if per_token > count:
        raise ValueError(
            f"num_experts_per_tok is {per_token}, more than the {count} experts there are"
        )
    coefficient = raw.get("router_aux_loss_coef", 0.001)
    return {
        "num_experts": count,
        "num_experts_per_tok": per_token,
        "moe_intermediate_size": integer(raw, "moe_intermediate_size", default=width),
        "norm_topk_prob": boolean(raw, "norm_topk_prob", renormalise),
        "router_aux_loss_coef": 0.0 if coefficient == 0 else positive(
            {"router_aux_loss_coef": coefficient}, "router_aux_loss_coef"
        ),
        "output_router_logits": boolean(raw, "output_router_logits", False),
    }  # fmt: skip


def sparse_layers(raw: Mapping[str, Any], layers: int) -> tuple[bool, ...]:
    """Whether each layer is a mixture."""
    dense = layer_indices(raw, "mlp_only_layers", layers)
    step = integer(raw, "decoder_sparse_step", default=1)
    return tuple(layer not in dense and (layer + 1) % step == 0 for layer in range(layers))


def _qwen2(raw: Mapping[str, Any], layers: int) -> dict[str, Any]:
    return {
        "attention_bias": boolean(raw, "qkv_bias", True),
        "sparse_layers": sparse_layers(raw, layers),
        "shared_expert_intermediate_size": integer(
            raw, "shared_expert_intermediate_size", default=5632
        ),
        **router_fields(raw, experts=60, chosen=4, width=1408, renormalise=False),
    }


def _qwen3(raw: Mapping[str, Any], layers: int) -> dict[str, Any]:
    return {
        "qk_norm": True,
        "attention_output_bias": boolean(raw, "attention_bias", False),
        "sparse_layers": sparse_layers(raw, layers),
        **router_fields(raw, experts=128, chosen=8, width=768, renormalise=False),
    }


def _early_odd_layers_slide(raw: Mapping[str, Any], layer: int) -> bool:
    return layer % 2 == 0 and layer < integer(raw, "max_window_layers", default=28)


QWEN2_MOE = Family(
    ("qwen2_moe",),
    _qwen2,
    keys=SPARSE_KEYS | SHARED_KEYS | {"qkv_bias"},
    sliding=_early_odd_layers_slide,
    default_window=4096,
    fused_adapters=True,
)
QWEN3_MOE = Family(
    ("qwen3_moe",),
    _qwen3,
    keys=SPARSE_KEYS,
    sliding=lambda raw, layer: True,
    default_window=4096,
    uniform_window=True,
)
