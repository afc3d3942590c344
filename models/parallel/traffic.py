"""Elements that a rank gives to the all-to-all of a layer.

Of what is given, a rank's own part, one in R, stays where it is. With n of N tokens on this rank,
W columns that are exchanged before heads are mixed, and O columns of their output:

    forward           n W + N O / R
    backward, none    n O + N W / R
    selective         n W + 2 n O + N W / R    (attention; n W + n O + N W / R of Gated DeltaNet)
    full              forward again, then as none

A mixture of experts gives, for n tokens with k experts each and m rows that its experts are sent,
(n k + m) H forward and (2 n k + m) H backward, of the hidden size H, and beside them n k weights of
rows forward and their m gradients backward. On an average m is n k.
"""

from __future__ import annotations

from dataclasses import dataclass

from models.config.model_config import ModelConfig
from models.parallel.delta_heads import DeltaShare
from models.parallel.head_exchange import copies_of
from models.parallel.token_slices import TokenSlices


@dataclass(frozen=True)
class Exchanged:
    """Elements of the activations' dtype in one layer, and `weights` of fp32 or wider."""

    forward: int
    backward: int
    weights: int = 0

    def bytes(self, itemsize: int) -> int:
        """Of both passes, with activations of `itemsize` bytes."""
        return (self.forward + self.backward) * itemsize + self.weights * max(4, itemsize)


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


def exchanged_rows(config: ModelConfig, tokens: int, rows: int) -> Exchanged:
    """What a mixture exchanges for `tokens` of this rank and `rows` that its experts are sent."""
    sent, hidden = tokens * config.num_experts_per_tok, config.hidden_size
    forward = (sent + rows) * hidden
    return Exchanged(forward, forward + sent * hidden, sent + rows)


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
