"""Attention of documents that begin with tokens they have in common.

A batch may hold such tokens once: a prompt with several answers is then laid out as
[prompt | answer 1 | answer 2 | ...] (N tokens), and means the documents [prompt | answer 1],
[prompt | answer 2], ... laid end to end (N' tokens). Everything but attention reads the N tokens.
Attention gathers queries, keys and values of the documents, works on those as on any others, and
takes every token's output from the first document that it belongs to:

    q'_j = q_source(j), and so k', v';   o_i = o'_own(i)
    do'_own(i) = do_i, else 0;           dk_i = sum of dk'_j over source(j) = i, and so dv;
                                         dq_i = dq'_own(i), as a query without do' has no dq'

A token belongs to two documents at most, so that the sums have one order. Their layout is a
gather and a scatter per layer: what is saved is the linear layers' work on every repeated token.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class SharedTokens:
    """How the tokens of a batch make up its documents.

    source (N',) int64 is the token of the batch at each position of the documents; own (N,) int64
    the position that a token's output comes from; copies (N' - N,) int64 the other positions. No
    token stands at more than two.
    """

    source: Tensor
    own: Tensor
    copies: Tensor

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """Everything that takes memory."""
        return self.source, self.own, self.copies

    def gathered(self, x: Tensor) -> Tensor:
        """x (N, ...) at the positions of the documents: (N', ...)."""
        return x.index_select(0, self.source)

    def taken(self, x: Tensor) -> Tensor:
        """x (N', ...) at every token's own position: (N, ...)."""
        return x.index_select(0, self.own)

    def spread(self, x: Tensor) -> Tensor:
        """x (N, ...) at own positions and zero at the copies: (N', ...), the inverse of `taken`."""
        spread = x.new_zeros(self.source.shape[0], *x.shape[1:])
        return spread.index_copy_(0, self.own, x)

    def folded(self, x: Tensor) -> Tensor:
        """x (N', ...) summed over the positions of every token: (N, ...)."""
        targets = self.source.index_select(0, self.copies)
        return self.taken(x).index_add_(0, targets, x.index_select(0, self.copies))


def prompts_shared(
    bounds: tuple[int, ...], prompts: tuple[int, ...]
) -> tuple[Tensor, Tensor, Tensor]:
    """source, own and copies of documents in pairs, the n-th of which share prompts[n] tokens.

    `bounds` are those of the documents, two for each pair.
    """
    source: list[Tensor] = []
    own: list[Tensor] = []
    copies: list[Tensor] = []
    token = 0
    for pair, prompt in enumerate(prompts):
        start, middle, end = bounds[2 * pair : 2 * pair + 3]
        first, rest = middle - start, end - middle - prompt
        source += [
            torch.arange(token, token + first),
            torch.arange(token, token + prompt),
            torch.arange(token + first, token + first + rest),
        ]
        own += [torch.arange(start, middle), torch.arange(middle + prompt, end)]
        copies.append(torch.arange(middle, middle + prompt))
        token += first + rest
    return torch.cat(source), torch.cat(own), torch.cat(copies)
