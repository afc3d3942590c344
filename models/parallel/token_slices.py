"""Which tokens of a batch each rank of a group has."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class TokenSlices:
    """Rank r has the tokens from edges[r] to edges[r + 1]; this one is number `rank`."""

    edges: tuple[int, ...]
    rank: int

    @classmethod
    def of(cls, tokens: int, rank: int, size: int) -> TokenSlices:
        """Slices as equal as they can be: some may have a token more, or none at all."""
        return cls(tuple(tokens * r // size for r in range(size + 1)), rank)

    @property
    def size(self) -> int:
        """Ranks of the group."""
        return len(self.edges) - 1

    @property
    def tokens(self) -> int:
        """Tokens of the whole batch."""
        return self.edges[-1]

    @property
    def first(self) -> int:
        """The first token of this rank."""
        return self.edges[self.rank]

    @property
    def counts(self) -> list[int]:
        """Tokens of every rank."""
        return [b - a for a, b in zip(self.edges[:-1], self.edges[1:], strict=True)]

    def own(self, x: Tensor) -> Tensor:
        """This rank's rows of x (N, ...), a view."""
        return x[self.first : self.edges[self.rank + 1]]
