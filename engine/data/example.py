"""`Example`: one tokenised row, with its trained tokens marked."""

from itertools import groupby
from operator import itemgetter

import numpy as np
import numpy.typing as npt


class Example:
    """One tokenised row, in five bytes a token.

    Attributes:
        ids: token ids, int32.
        mask: which of them are trained, bool; the first never is, as nothing predicts it.
        source: where the row stands, as `file:line`.
        weights: how much each token counts in a loss, float32; None where all count alike.
    """

    __slots__ = ("ids", "mask", "source", "weights")

    def __init__(
        self,
        input_ids: npt.ArrayLike,
        trained: npt.ArrayLike,
        source: str,
        weights: npt.ArrayLike | None = None,
    ) -> None:
        self.ids: npt.NDArray[np.int32] = np.array(input_ids, dtype=np.int32)
        self.mask: npt.NDArray[np.bool_] = np.array(trained, dtype=np.bool_)
        self.source = source
        if self.ids.ndim != 1 or self.ids.shape != self.mask.shape:
            raise ValueError(f"{self.ids.shape} ids with {self.mask.shape} marks in {source}")
        self.mask[:1] = False
        self.weights: npt.NDArray[np.float32] | None = None
        if weights is not None:
            self.weights = np.array(weights, dtype=np.float32)
            if self.weights.shape != self.ids.shape:
                raise ValueError(f"{self.weights.shape} weights for {self.ids.shape} ids")

    @property
    def input_ids(self) -> list[int]:
        """Token ids as a list."""
        ids: list[int] = self.ids.tolist()
        return ids

    @property
    def trained(self) -> list[bool]:
        """Which tokens are trained, as a list."""
        marks: list[bool] = self.mask.tolist()
        return marks

    def stretches(self) -> list[tuple[bool, list[int]]]:
        """Consecutive tokens that are all trained (True) or all not, to be decoded together."""
        pairs = groupby(zip(self.trained, self.input_ids, strict=True), key=itemgetter(0))
        return [(trained, [token for _, token in group]) for trained, group in pairs]

    @property
    def trained_tokens(self) -> int:
        """Number of trained tokens."""
        return int(np.count_nonzero(self.mask))

    def __len__(self) -> int:
        return len(self.ids)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Example):
            return NotImplemented
        return (
            self.source == other.source
            and np.array_equal(self.ids, other.ids)
            and np.array_equal(self.mask, other.mask)
            and (self.weights is None) == (other.weights is None)
            and (self.weights is None or np.array_equal(self.weights, other.weights))  # type: ignore[arg-type]
        )

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"Example({self.source}, {len(self)} tokens, {self.trained_tokens} trained)"
