"""What all layers of a pass read, and a step's settings."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from torch import Tensor

from kernels.attention import AttentionPlan
from kernels.elementwise.dropout import Seed, dropout, dropped
from kernels.linear.columns import Columns, matrix_of
from kernels.loss.cross_entropy import PLAIN, LossTerms
from models.cache.one_sequence import LayerCache
from models.layers.linear import RowGroups
from models.parallel.head_exchange import HeadExchange

_COUNT = re.compile("[0-9]{1,4}")

POLICIES = ("none", "selective", "full")
"""Checkpointing policies (see `models.layers.block`)."""

_SITES = 6
_BLOCK_SITE, _BLOCK_SITES = 1 << 20, 3


def layer_policies(text: str, layers: int) -> tuple[str, ...]:
    """The checkpointing policy of every layer: "full", or "full:20,none" for 20 and the rest.

    The last part needs no count. Raises `ValueError` where a policy is unknown or the counts are
    not those of the layers.
    """
    policies: list[str] = []
    parts = text.split(",")
    for index, part in enumerate(parts):
        policy, _, count = part.strip().partition(":")
        counted = _COUNT.fullmatch(count) if count else index == len(parts) - 1
        if policy not in POLICIES or not counted:
            raise ValueError(
                f"checkpointing policy {text!r}; expected one of {', '.join(POLICIES)}, or "
                "policies with numbers of layers such as full:20,none"
            )
        policies += [policy] * (int(count) if count else max(0, layers - len(policies)))
    if len(policies) != layers:
        raise ValueError(
            f"checkpointing policy {text!r} is for {len(policies)} layers; there are {layers}"
        )
    return tuple(policies)


@dataclass(frozen=True)
class StepSettings:
    """How one step is computed. All but the last seven change time and memory, not gradients.

    With `mlp_tile_tokens` the feed-forward part takes that many tokens at a time and saves no inner
    activation under any checkpointing policy (`models.layers.token_tiles`); experts sort their rows
    within a tile, so that dropout, if any, then drops other elements of them. With
    `low_memory_decode` no more than one decoded weight, or one group of those that attention reads
    together, exists at a time, and attention goes over its heads in parts. `checkpointing` is a
    policy for all layers or one for each (`layer_policies`). With `offload_inputs` the layers'
    inputs wait for backward in the host's memory (`models.memory.offload`). `loss_chunk_tokens`
    bounds the tokens whose logits exist at a time; None lets the loss choose.

    `router_loss` is the factor of the router's load balancing loss; None is the model's own.
    `dropout_seed`, 63 bits, turns dropout on in training mode: that of adapters, which have a
    probability of their own, that of the embedding and of what every part of a block adds to its
    input (`hidden_dropout`), and that of attention's weights (`attention_dropout`). It is the seed
    of the noise of size `neftune_alpha` too (`models.layers.noise`). `loss_terms` are what the loss
    of a step has beside cross-entropy. A batch that is a part of a micro-batch begins at its token
    `first_row`: masks are those of the whole.
    """

    mlp_tile_tokens: int | None = None
    low_memory_decode: bool = False
    checkpointing: str = "selective"
    offload_inputs: bool = False
    loss_chunk_tokens: int | None = None
    router_loss: float | None = None
    dropout_seed: int | None = None
    hidden_dropout: float = 0.0
    attention_dropout: float = 0.0
    neftune_alpha: float = 0.0
    loss_terms: LossTerms = PLAIN
    first_row: int = 0

    @property
    def drops(self) -> bool:
        """Whether the model itself, not an adapter, has dropout."""
        return self.hidden_dropout > 0.0 or self.attention_dropout > 0.0

    @property
    def output_scratch(self) -> str:
        """The scratch buffer for decoded weights that write a block's output."""
        return "wide" if self.low_memory_decode else "narrow"


DEFAULT_SETTINGS = StepSettings()


@dataclass(frozen=True)
class OutputDropout:
    """Dropout of what is added to a block's input; without a seed it changes nothing."""

    p: float = 0.0
    seed: Seed | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """x (N, H), or its gradient, with elements dropped."""
        return x if self.seed is None else dropout(x, self.p, self.seed)

    def gradient(self, dy: Tensor | Columns) -> Tensor | Columns:
        """The gradient of what was dropped from that of the result."""
        return dy if self.seed is None else self(matrix_of(dy))

    def from_row(self, first: int) -> OutputDropout:
        """The same dropout for rows that begin with the row `first` of the whole."""
        return self if self.seed is None else replace(self, seed=self.seed.at(0, first_row=first))


@dataclass(frozen=True)
class LayerContext:
    """What every layer reads besides its input, made once per forward pass.

    cos, sin (N, rotary_dim / 2); `dropout_key` int64 (), None means no dropout. With a `cache` the
    tokens are the next ones of the cached sequences, and `groups` may say which of them are
    computed with which named adapter. With an `exchange` layers are given a slice of the batch's
    tokens; cos, sin and the plan are those of all.
    """

    cos: Tensor
    sin: Tensor
    plan: AttentionPlan
    dropout_key: Tensor | None = None
    cache: LayerCache | None = None
    settings: StepSettings = DEFAULT_SETTINGS
    groups: RowGroups | None = None
    exchange: HeadExchange | None = None

    def seed(self, layer: int, site: int) -> Seed | None:
        """Seed of one dropout site: 0 and 1 are the mixer's, 2 to 5 the feed-forward part's."""
        return self._seed(layer * _SITES + site)

    def block_seed(self, layer: int, site: int) -> Seed | None:
        """Seed of the mixer's output (0) or the feed-forward part's (1)."""
        return self._seed(_BLOCK_SITE + layer * _BLOCK_SITES + site)

    def attention_seed(self, layer: int) -> Seed | None:
        """Seed of attention's weights, whose rows are queries of all tokens."""
        return self._seed(_BLOCK_SITE + layer * _BLOCK_SITES + 2, whole=True)

    def _seed(self, site: int, whole: bool = False) -> Seed | None:
        if self.dropout_key is None:
            return None
        first = self.settings.first_row
        if self.exchange is not None and not whole:
            first += self.exchange.first_token
        return Seed(self.dropout_key, site, base=first)

    def output_dropout(self, layer: int, site: int) -> OutputDropout:
        """The dropout of what the mixer (0) or the feed-forward part (1) of a layer adds."""
        p = self.settings.hidden_dropout
        return OutputDropout(p, self.block_seed(layer, site) if p > 0.0 else None)

    def embedded(self, x: Tensor) -> Tensor:
        """The embedding's rows (N, H) with elements dropped, for autograd."""
        p, seed = self.settings.hidden_dropout, self._seed(_BLOCK_SITE - 1)
        return x if seed is None or p == 0.0 else dropped(x, p, seed)
