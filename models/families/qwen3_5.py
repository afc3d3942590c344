"""Qwen3.5, 3.6 and 3.8: Qwen3-Next with separate projections.

The hub's files are of a model that also sees pictures: the decoder's configuration stands in
`text_config`, its tensors under `model.language_model.`, and those of the vision tower
(`model.visual.`) and of multi-token prediction (`mtp.`) are carried along untouched. For text the
three position rows of its rotary embedding are equal, which makes it the plain one. The mixtures
renormalise the weights of their chosen experts always, and every layer is one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from models.families.family import Family
from models.families.json_values import integer
from models.families.qwen3_next import CARRIED, HYBRID_KEYS, hybrid_fields
from models.families.qwen_moe import ROUTER_KEYS, SHARED_KEYS, router_fields

_IGNORED = frozenset(
    {
        "attn_output_gate",
        "mamba_ssm_dtype",
        "mlp_only_layers",
        "mtp_num_hidden_layers",
        "mtp_use_dedicated_embeddings",
        "output_gate_type",
    }
)
_CARRIED = (*CARRIED, "model.visual.")


def _check_switches(raw: Mapping[str, Any]) -> None:
    """Keys that the published models hold at one value only."""
    for key, allowed in (("attn_output_gate", (True,)), ("output_gate_type", ("swish", "silu"))):
        if raw.get(key, allowed[0]) not in allowed:
            raise ValueError(f"{key} is {raw[key]!r}; expected {allowed[0]!r}")


def _dense(raw: Mapping[str, Any], layers: int) -> dict[str, Any]:
    _check_switches(raw)
    return hybrid_fields(raw, layers)


def _sparse(raw: Mapping[str, Any], layers: int) -> dict[str, Any]:
    _check_switches(raw)
    router = router_fields(raw, experts=256, chosen=8, width=512, renormalise=True)
    shared = integer(raw, "shared_expert_intermediate_size", default=512)
    return {
        **hybrid_fields(raw, layers),
        **router,
        "norm_topk_prob": True,
        "sparse_layers": (True,) * layers,
        "shared_expert_intermediate_size": shared,
        "intermediate_size": router["moe_intermediate_size"],
    }


QWEN3_5 = Family(
    ("qwen3_5", "qwen3_5_text"),
    _dense,
    keys=HYBRID_KEYS,
    ignored=_IGNORED,
    head_dim=256,
    partial_rotary=0.25,
    nested=("qwen3_5",),
    carried=_CARRIED,
)
QWEN3_5_MOE = Family(
    ("qwen3_5_moe", "qwen3_5_moe_text"),
    _sparse,
    keys=HYBRID_KEYS | ROUTER_KEYS | SHARED_KEYS,
    ignored=_IGNORED | {"intermediate_size"},
    head_dim=256,
    partial_rotary=0.25,
    nested=("qwen3_5_moe",),
    carried=_CARRIED,
    fused_experts=True,
    fused_adapters=True,
)
