"""The output head: logits and loss, of whole rows or a rank's."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.few_rows.project import multiply_head
from kernels.linear.dense import dense_product
from kernels.loss.cross_entropy import PLAIN, LossTerms
from kernels.loss.linear_cross_entropy import Head, head_logits, linear_cross_entropy
from kernels.loss.linear_preference import sequence_log_probs
from kernels.vocabulary.shard import VocabularyShard
from kernels.vocabulary.sharded_cross_entropy import sharded_cross_entropy, sharded_logits
from kernels.vocabulary.sharded_log_probs import sharded_log_probs


@dataclass(frozen=True, eq=False)
class OutputHead:
    """A head (V, H), or this rank's rows of one, which are then those of `shard`."""

    weight: Head
    shard: VocabularyShard | None = None

    @property
    def whole(self) -> Head:
        """All rows. Raises `ValueError` where each rank has its own."""
        if self.shard is not None:
            raise ValueError(
                "the output head is divided among ranks, and what is asked for needs all of its "
                "rows: losses of next tokens and of answers, and generation, do without; divide "
                "the layers' weights alone"
            )
        return self.weight

    def loss(
        self,
        trained: Tensor,
        targets: Tensor,
        num_items: float,
        chunk: int | None = None,
        weights: Tensor | None = None,
        terms: LossTerms = PLAIN,
    ) -> Tensor:
        """Cross-entropy of trained tokens (n, H) after the final norm, divided by `num_items`."""
        if self.shard is None:
            return linear_cross_entropy(
                trained, self.weight, targets, num_items, chunk, weights, terms
            )
        return sharded_cross_entropy(trained, self.shard, targets, num_items, chunk, weights, terms)

    def log_probs(
        self,
        trained: Tensor,
        targets: Tensor,
        slots: Tensor,
        shape: tuple[int, int],
        chunk: int | None = None,
    ) -> Tensor:
        """log p (S,) of sequences of trained tokens (n, H) after the final norm.

        `slots` and `shape` are those of `kernels.loss.linear_preference`.
        """
        if self.shard is None:
            return sequence_log_probs(trained, self.weight, targets, slots, shape, chunk)
        return sharded_log_probs(trained, self.shard, targets, slots, shape, chunk)

    def logits(self, x: Tensor) -> Tensor:
        """x (N, H) after the final norm -> (N, V), with gradients where the head is dense."""
        if self.shard is not None:
            return sharded_logits(x, self.shard)
        return x @ self.weight.T if isinstance(self.weight, Tensor) else head_logits(x, self.weight)

    @torch.no_grad()
    def next_logits(self, x: Tensor) -> Tensor:
        """Logits (N, V) of x (N, H) after the final norm, without gradients."""
        if self.shard is not None:
            return sharded_logits(x, self.shard)
        logits = multiply_head(x, self.weight)
        if logits is not None:
            return logits
        if not isinstance(self.weight, Tensor):
            return head_logits(x, self.weight)
        return dense_product(x, self.weight, x.new_empty(len(x), self.weight.shape[0]))
