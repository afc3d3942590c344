"""Which examples form which batch, and the batch itself.

The order is a pure function of (seed, epoch, index): nothing is drawn from a generator that
somebody else could advance, so a resumed run reads the same batches without replaying the earlier
ones. Random bits come raw from Philox (Salmon et al., 2011, "Parallel random numbers: as easy as
1, 2, 3"), whose stream numpy promises never to change; an epoch's order is the order of those
numbers. Documents are laid end to end without padding.
"""

from collections.abc import Hashable, Sequence

import numpy as np
import numpy.typing as npt
import torch

from engine.data.batches.packing import best_fit
from engine.data.examples import Example
from engine.data.rows import Row
from models.layers.packed_batch import PackedBatch

IGNORED = -100
"""The label of a position that is not trained, as Hugging Face has it."""

SHUFFLE, SPLIT, WEIGHTS = 1, 2, 3
"""Purposes of random numbers, so that no two draw the same ones."""


def collate(examples: Sequence[Example], weighted: bool = False) -> PackedBatch:
    """Lay examples end to end, one document each, `weighted` with how much each token counts.

    Raises:
        ValueError: there are none, or one is empty.
    """
    if not examples or not all(len(example) for example in examples):
        raise ValueError("a batch needs at least one example, and every example a token")
    ids = np.concatenate([example.ids for example in examples]).astype(np.int64)
    mask = np.concatenate([example.mask for example in examples])
    ends = np.cumsum([len(example) for example in examples])
    weights = None
    if weighted and any(example.weights is not None for example in examples):
        each = [np.ones(len(e), np.float32) if e.weights is None else e.weights for e in examples]
        weights = torch.from_numpy(np.concatenate(each))
    return PackedBatch.of(
        torch.from_numpy(ids),
        torch.from_numpy(np.where(mask, ids, IGNORED)),
        torch.from_numpy(np.concatenate([[0], ends])),
        weights,
    )


class BatchPlan:
    """The batches of every epoch.

    Without packing a batch is `batch_size` examples; with it, `batch_size` bins of at most
    `max_length` tokens, each filled with whole examples by best fit. The last batch of an epoch
    may be smaller; no example is left out or read twice in an epoch.
    """

    def __init__(
        self,
        lengths: Sequence[int] | Sequence[Example],
        batch_size: int,
        seed: int,
        packing: bool = False,
        max_length: int | None = None,
    ) -> None:
        """Plan batches.

        Args:
            lengths: tokens of each example, or the examples.
            batch_size: examples, or bins, of a batch.
            seed: of the order, 0 or more.
            packing: fill bins instead of counting examples.
            max_length: tokens of a bin; with packing only, by default the longest example's.

        Raises:
            ValueError: there is nothing to plan, or an argument is out of range.
        """
        sizes = [item if isinstance(item, int | np.integer) else len(item) for item in lengths]
        if not sizes or batch_size < 1 or seed < 0:
            raise ValueError(f"{len(sizes)} examples, batch size {batch_size}, seed {seed}")
        self._sizes = np.array(sizes, dtype=np.int64)
        self._batch_size, self._seed = batch_size, seed
        self._budget = (max_length or max(sizes)) if packing else None
        self._bins = best_fit(sizes, self._budget) if self._budget else None
        self._groups = len(self._bins) if self._bins is not None else len(sizes)
        self._cached: tuple[int, list[list[int]]] | None = None

    @property
    def steps_per_epoch(self) -> int:
        """Batches of an epoch, the same in all of them."""
        return -(-self._groups // self._batch_size)

    @property
    def fill(self) -> float:
        """Share of the bins' tokens that is filled; 1.0 without packing."""
        if self._budget is None:
            return 1.0
        return float(self._sizes.sum()) / (self._groups * self._budget)

    def batch(self, epoch: int, index: int) -> list[int]:
        """Indices of the examples of one batch, in the order they are laid.

        Raises:
            IndexError: the epoch has no such batch.
        """
        if not 0 <= index < self.steps_per_epoch or epoch < 0:
            raise IndexError(f"batch {index} of epoch {epoch}, which has {self.steps_per_epoch}")
        if self._cached is None or self._cached[0] != epoch:
            self._cached = (epoch, self._epoch(epoch))
        groups = self._cached[1][index * self._batch_size : (index + 1) * self._batch_size]
        return [example for group in groups for example in group]

    def _epoch(self, epoch: int) -> list[list[int]]:
        order = permutation(len(self._sizes), self._seed, SHUFFLE, 2 * epoch)
        if self._bins is None:
            return [[example] for example in order.tolist()]
        # The bins of an epoch are those of the plan with examples of equal length exchanged: who
        # shares a bin changes, and the number of bins does not.
        assert self._budget is not None
        packed = best_fit(self._sizes[order].tolist(), self._budget)
        bins = [[int(order[index]) for index in group] for group in packed]
        shuffled = permutation(len(bins), self._seed, SHUFFLE, 2 * epoch + 1)
        return [bins[number] for number in shuffled.tolist()]


def split_heldout(rows: Sequence[Row], fraction: float, seed: int) -> tuple[list[Row], list[Row]]:
    """Split rows into those to train on and those to test on.

    Rows with the same user messages stay together, so that a question is not tested whose answer
    was learnt. Both parts keep the order of the rows.

    Args:
        rows: the data set.
        fraction: share to hold out, 0 to 1 (exclusive); at least one group is, if there are two.
        seed: of the choice.

    Returns:
        the training rows and the held-out rows; the latter are empty for a fraction of 0.

    Raises:
        ValueError: the fraction is out of range.
    """
    heldout = heldout_indices([question_of(row) for row in rows], fraction, seed)
    train = [row for index, row in enumerate(rows) if index not in heldout]
    return train, [row for index, row in enumerate(rows) if index in heldout]


def heldout_indices(questions: Sequence[Hashable], fraction: float, seed: int) -> set[int]:
    """Which rows are held out, given what each asks; see `split_heldout`, which raises the same."""
    if not 0 <= fraction < 1:
        raise ValueError(f"a held-out fraction of {fraction}, which must be from 0 up to below 1")
    groups: dict[Hashable, list[int]] = {}
    for index, question in enumerate(questions):
        groups.setdefault(question, []).append(index)
    wanted = 0 if fraction == 0 or len(groups) < 2 else max(1, round(fraction * len(questions)))
    heldout: set[int] = set()
    members = list(groups.values())
    for number in permutation(len(members), seed, SPLIT, 0).tolist()[: len(members) - 1]:
        if len(heldout) >= wanted:
            break
        heldout.update(members[number])
    return heldout


def permutation(count: int, seed: int, purpose: int, draw: int) -> npt.NDArray[np.int64]:
    """An order of 0..count-1 that depends on these four numbers and on nothing else."""
    key = np.array([seed % 2**64, (purpose << 56) | draw], dtype=np.uint64)
    numbers = np.random.Philox(key=key).random_raw(count)
    return np.argsort(numbers, kind="stable").astype(np.int64)


def question_of(row: Row) -> str:
    asked = [str(message.get("content")) for message in row.messages if message["role"] == "user"]
    return "\x00".join(asked) or row.source
