"""Batches whose trained tokens are divided into sequences."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import cast

import numpy as np
import numpy.typing as npt
import torch

from engine.data.batches.loader import IGNORED
from engine.data.examples import Example
from engine.data.preferences import JudgedExample, PairExample
from models.layers.packed_batch import PackedBatch, Sequences

Marked = tuple[npt.NDArray[np.int32], npt.NDArray[np.bool_]]
"""Ids of a sequence, and which of them are trained."""


@dataclass(frozen=True)
class AnswerSet:
    """Pairs or judged answers, and the batches that some of them make.

    With `share_prompts` the batches hold the prompt of a pair once.
    """

    examples: Sequence[Example]
    max_length: int
    share_prompts: bool = False

    def batch(self, indices: Sequence[int]) -> PackedBatch:
        """The sequences of these examples."""
        batch = collate_sequences(self.examples, indices)
        return batch.with_shared(self._prompts(indices)) if self.share_prompts else batch

    def length(self, index: int) -> int:
        """Tokens that an example lays into a batch."""
        prompt = self._prompts([index])[0] if self.share_prompts else 0
        return len(self.examples[index]) - prompt

    def _prompts(self, indices: Sequence[int]) -> list[int]:
        pairs = cast(Sequence[PairExample], self.examples)
        return [pairs[index].prompt for index in indices]

    def mismatched(self, indices: Sequence[int]) -> PackedBatch:
        """The prompts of these judged answers, each with another one's answer."""
        return collate_mismatched(self._judged(), indices, self.max_length)

    def good(self, indices: Sequence[int]) -> list[bool]:
        """Which of these judged answers are good ones."""
        judged = self._judged()
        return [judged[index].good for index in indices]

    def digest(self, indices: Sequence[int]) -> str:
        """SHA-256 of these examples' tokens, of what is trained of them and of their order."""
        digest = hashlib.sha256(f"{self.max_length} {len(self.examples)}".encode())
        for index in indices:
            example = self.examples[index]
            split = example.split if isinstance(example, PairExample) else 0
            digest.update(f"\0{index} {len(example)} {split}\0".encode())
            digest.update(example.ids.tobytes())
            digest.update(example.mask.tobytes())
        return digest.hexdigest()

    def _judged(self) -> Sequence[JudgedExample]:
        return cast(Sequence[JudgedExample], self.examples)


def collate_sequences(examples: Sequence[Example], indices: Sequence[int]) -> PackedBatch:
    """Lay the sequences of some examples end to end, one document each.

    Of a pair the chosen sequence comes first. `indices` say which of `examples` they are.
    """
    marked: list[Marked] = []
    owners: list[int] = []
    for index in indices:
        example = examples[index]
        parts = example.parts() if isinstance(example, PairExample) else (_whole(example),)
        marked += parts
        owners += [index] * len(parts)
    return _packed(marked, owners)


def collate_mismatched(
    examples: Sequence[JudgedExample], indices: Sequence[int], max_length: int
) -> PackedBatch:
    """Each example's prompt with the answer of the example after it, the last with the first's.

    What is longer than `max_length` is cut.
    """
    marked = []
    for index in indices:
        own, other = examples[index], examples[(index + 1) % len(examples)]
        answer_ids, answer_mask = other.ids[other.prompt :], other.mask[other.prompt :]
        ids = np.concatenate([own.ids[: own.prompt], answer_ids])[:max_length]
        mask = np.concatenate([np.zeros(own.prompt, dtype=np.bool_), answer_mask])[:max_length]
        mask[:1] = False
        marked.append((ids, mask))
    return _packed(marked, indices)


def _whole(example: Example) -> Marked:
    return example.ids, example.mask


def _packed(marked: Sequence[Marked], owners: Sequence[int]) -> PackedBatch:
    ids = np.concatenate([ids for ids, _ in marked]).astype(np.int64)
    mask = np.concatenate([mask for _, mask in marked])
    ends = np.cumsum([len(ids) for ids, _ in marked])
    batch = PackedBatch.of(
        torch.from_numpy(ids),
        torch.from_numpy(np.where(mask, ids, IGNORED)),
        torch.from_numpy(np.concatenate([[0], ends])),
    )
    counts = [int(np.count_nonzero(mask)) for _, mask in marked]
    return replace(batch, sequences=Sequences.of(counts, owners))
