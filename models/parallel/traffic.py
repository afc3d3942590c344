"""Elements that a rank gives to the all-to-all of a layer.

Of what is given, a rank's own part, one in R, stays where it is. With n of N tokens on this rank,
W columns that are exchanged before heads are mixed, and O columns of their output:

    forward           n W + N O / R
    backward, none    n O + N W / R
    selective         n W + 2 n O + N W / R    (attention; n W + n O + N W / R of Gated DeltaNet)
    full              forward again, then as none
"""

from __future__ import annotations

from dataclasses import dataclass

from models.config.model_config import ModelConfig
from models.parallel.delta_heads import DeltaShare
from models.parallel.head_exchange import copies_of
from models.parallel.token_slices import TokenSlices


@dataclass(frozen=True)
class Exchanged:
    """Elements of the activations' dtype in one layer."""

    forward: int
    backward: int

    def bytes(self, itemsize: int) -> int:
        """Of both passes, with activations of `itemsize` bytes."""
        return (self.forward + self.backward) * itemsize


def exchanged_heads(
    config: ModelConfig, layer: int, slices: TokenSlices, policy: str = "selective"
) -> Exchanged:
    """What the mixer of a layer exchanges under a checkpointing policy, of one batch.

    A layer below the first that is trained has no backward pass.
    """
    linear = config.layer_types[layer] == "linear_attention"
    before, after = (_delta_columns if linear else _attention_columns)(config, layer, slices.size)
    own, share = slices.counts[slices.rank], slices.tokens
    forward = own * before + share * after // slices.size
    backward = own * after + share * before // slices.size
    if policy == "full":
        backward += forward
    elif policy == "selective":
        backward += own * before + (0 if linear else own * after)
    return Exchanged(forward, backward)


def _attention_columns(config: ModelConfig, layer: int, ranks: int) -> tuple[int, int]:
    heads, kv_heads, dim = config.heads(layer), config.kv_heads(layer), config.head_dim
    copies = copies_of(heads, kv_heads, ranks)
    return (heads + 2 * kv_heads * copies) * dim, heads * dim


def _delta_columns(config: ModelConfig, layer: int, ranks: int) -> tuple[int, int]:
    heads = DeltaShare(
        config.linear_num_key_heads,
        config.linear_num_value_heads,
        config.linear_key_head_dim,
        config.linear_value_head_dim,
        ranks=ranks,
    )
    return (heads.width + 2 * heads.values) * ranks, heads.value_heads * heads.value_dim
